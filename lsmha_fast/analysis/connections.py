"""Connections to keep by what the nodes at their ends recognise: our readings of AFCC and ANDC.

The papers' own rules (arXiv 2501.12880 and 2501.12900) were not available to us; see
docs/pruning.md. A node recognises the labels that are in a cluster of its SNP matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..models import CCT
from ..nn import EncoderBlock
from ._features import Batches
from .clusters import find_clusters
from .probes import BlockProbe, Probes
from .shp import SHP, single_head_performance
from .training import train_probes
from .units import UnitView

# nodes measured per block, in the order of the view
KINDS = ("head_nodes", "mlp_in", "mlp", "block")
# layers of a block that join one kind to the next
LAYERS = ("self_attn.out_proj", "linear1", "linear2")
Masks = dict[str, Tensor]  # parameter name -> Boolean of its shape, True where it is kept
Recognized = Mapping[str, Sequence[Tensor]]  # kind -> per block (nodes, K) bool


def measure_nodes(
    model: CCT,
    train_batches: Batches,
    batches: Batches,
    *,
    epochs: int = 30,
    lr: float = 1e-2,
    device: torch.device | str | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> SHP:
    """SNP of all nodes of a CCT in one pass of `batches`: blocks by kind, then "final".

    Probes are trained for every kind and block. The readout of "final" is the model's own pooling
    and classifier.

    Args:
        model: the trained network.
        train_batches: for the probes.
        batches: to measure on.
        epochs, lr, device, progress: see `train_probes`.
    """
    view = UnitView(model, *KINDS)
    probes = train_probes(
        view, train_batches, epochs=epochs, lr=lr, device=device, progress=progress
    )
    own = BlockProbe(
        model.pool.weight.detach().cpu().reshape(-1, 1),
        model.fc.weight.detach().cpu()[:, :, None],
        model.fc.bias.detach().cpu(),
    )
    everything = Probes((*probes.blocks, own), (*probes.block_names, "final"))
    return single_head_performance(
        UnitView(model, *KINDS, "final"), everything, batches, device=device
    )


def recognized_labels(snp: SHP, *, threshold: float, normalize: str = "matrix") -> Recognized:
    """What every node recognises: kind -> per block (nodes, K) bool; "final" has one block."""
    per_kind = (len(snp.sums) - 1) // len(KINDS)
    found = [
        find_clusters(snp.matrix(m), threshold=threshold, normalize=normalize).recognized
        for m in range(len(snp.sums))
    ]
    kinds = {kind: found[n * per_kind : (n + 1) * per_kind] for n, kind in enumerate(KINDS)}
    return {**kinds, "final": found[-1:]}


def shared_labels(inputs: Tensor, outputs: Tensor) -> Tensor:
    """(O, I) bool of nodes (I, K) and (O, K): whether two nodes recognise a label in common."""
    return outputs.double() @ inputs.double().T > 0


def afcc_masks(model: CCT, recognized: Recognized) -> Masks:
    """AFCC, our reading: a connection stays where both nodes recognise a label in common.

    Of every block: output projection (head nodes to MLP inputs), `linear1` (MLP inputs to hidden
    nodes), `linear2` (hidden nodes to the block's outputs).
    """
    masks = {}
    for m, name in enumerate(_blocks(model)):
        nodes = [recognized[kind][m] for kind in KINDS]
        for layer, (inputs, outputs) in zip(LAYERS, pairwise(nodes), strict=True):
            masks[f"{name}.{layer}.weight"] = shared_labels(inputs, outputs)
    return masks


def andc_masks(model: CCT, recognized: Recognized) -> Masks:
    """ANDC, our reading: what is not on the diagonal of a node's SNP goes.

    A connection of the classifier stays where its label is in a cluster of its node; head nodes
    and hidden nodes without any cluster lose all outgoing connections.
    """
    masks = {"fc.weight": recognized["final"][0].T.clone()}
    for m, name in enumerate(_blocks(model)):
        for layer, kind in (("self_attn.out_proj", "head_nodes"), ("linear2", "mlp")):
            weight = model.get_parameter(f"{name}.{layer}.weight")
            speaks = recognized[kind][m].any(1)
            masks[f"{name}.{layer}.weight"] = speaks.expand(weight.shape).clone()
    return masks


def _blocks(model: CCT) -> list[str]:
    return [
        f"blocks.{number}"
        for number, block in enumerate(model.blocks)
        if isinstance(block, EncoderBlock)
    ]


def control_masks(model: CCT, masks: Masks, seed: int | None) -> Masks:
    """Masks that remove as many connections of every matrix, whole columns for whole columns.

    Args:
        model: whose weights they are for.
        masks: what they are a control of.
        seed: of a random choice; None removes the smallest weights, or columns of least norm.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    controls = {}
    for name, mask in masks.items():
        by_column = bool((mask == mask[:1]).all())
        weight = model.get_parameter(name).detach().cpu().double()
        score = weight.norm(dim=0) if by_column else weight.abs().flatten()
        if generator is not None:
            score = torch.randperm(len(score), generator=generator).double()
        removed = int((~(mask[0] if by_column else mask)).sum())
        keep = torch.ones(len(score), dtype=torch.bool)
        keep[score.argsort(stable=True)[:removed]] = False
        controls[name] = keep.expand(mask.shape).clone() if by_column else keep.view(mask.shape)
    return controls


@torch.no_grad()
def masked_model(model: CCT, masks: Masks) -> CCT:
    """A copy of a CCT whose other connections are zero.

    Raises:
        ValueError: a mask of another shape.
    """
    pruned = copy.deepcopy(model)
    for name, mask in masks.items():
        weight = pruned.get_parameter(name)
        if mask.shape != weight.shape:
            raise ValueError(f"{name}: a mask {tuple(mask.shape)} for {tuple(weight.shape)}")
        weight.mul_(mask.to(weight))
    return pruned
