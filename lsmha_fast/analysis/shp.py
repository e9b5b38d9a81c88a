"""Single-head performance (SHP): the field matrix of every head of every block in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import ops
from ._features import Batches, HeadBatch, frozen, head_batches, model_device
from ._io import load_npz, save_npz
from .probes import Probes, fitting_blocks, normalized

_KIND = "lsmha_fast.shp/1"
POOLINGS = ("head", "full")
# batches whose sums are added before they join the total; fixed, so that sums are the same to the
# last bit however the batches are shared out
GROUP = 4


@dataclass(frozen=True, eq=False)
class SHP:
    """The SHP matrices of all heads, kept as their factors.

    Fields are linear in the pooled vector, so the K x K matrix of head h is the product of the
    class means of its pooled vectors, (K, D), and its columns of the probe's linear layer, (K, D).
    Sums over disjoint sets of images add up.

    Attributes:
        sums: per block, per-class sums of the pooled vectors, (K, H, D), fp64, on the CPU.
        counts: images of every class, (K,), int64.
        fc_weight: per block, the probe's linear layer, (K, H, D).
        fc_bias: per block, its bias, (K,).
        block_names, class_names: what rows and pictures are called.
        pooling: "head" (token weights from the head alone) or "full" (from all heads).
        bias: whether the fields include the probe's bias.
        layer_norm: whether the probe has a LayerNorm; heads are silenced after it.
    """

    sums: tuple[Tensor, ...]
    counts: Tensor
    fc_weight: tuple[Tensor, ...]
    fc_bias: tuple[Tensor, ...]
    block_names: tuple[str, ...]
    class_names: tuple[str, ...]
    pooling: str = "head"
    bias: bool = False
    layer_norm: bool = False

    def matrix(self, block: int, heads: slice = slice(None)) -> Tensor:
        """Fields M[h, i, j] of block number `block` (from 0), (H, K, K), fp32.

        M[h, i, j] is the mean of output j over the images of true label i when only head h is
        alive. The row of a label without images is zero.

        Args:
            block: from 0.
            heads: those wanted, by default all.
        """
        counts = self.counts.double()[:, None, None]
        means = self.sums[block][:, heads] / counts.clamp(min=1)  # (K, H, D)
        weight = self.fc_weight[block][:, heads].double()
        fields = torch.einsum("ihd,jhd->hij", means, weight)
        if self.bias:
            fields = fields + self.fc_bias[block].double()
        return torch.where(self.counts[:, None] > 0, fields, 0.0).float()

    @cached_property
    def matrices(self) -> tuple[Tensor, ...]:
        """`matrix` of every block."""
        return tuple(self.matrix(m) for m in range(len(self.sums)))

    def save(self, path: str | Path, *, matrices: bool = True) -> Path:
        """Write one .npz: factors, options, and `matrices.0`, `matrices.1`, ... for other tools.

        An interrupted call leaves an earlier file as it was.

        Args:
            path: of the file.
            matrices: False leaves the matrices out, which at 1000 labels are a thousand times
                larger than their factors and are not read back.
        """
        arrays = {"counts": self.counts.numpy()}
        for m in range(len(self.sums)):
            arrays[f"sums.{m}"] = self.sums[m].numpy()
            arrays[f"fc_weight.{m}"] = self.fc_weight[m].numpy()
            arrays[f"fc_bias.{m}"] = self.fc_bias[m].numpy()
            if matrices:
                arrays[f"matrices.{m}"] = self.matrices[m].numpy()
        info = {
            "kind": _KIND,
            "block_names": self.block_names,
            "class_names": self.class_names,
            "pooling": self.pooling,
            "bias": self.bias,
            "layer_norm": self.layer_norm,
        }
        save_npz(path, arrays, info)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> SHP:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or holds something else.
        """
        arrays, info = load_npz(path, _KIND)
        try:
            tensors = {name: torch.from_numpy(a) for name, a in arrays.items()}
            sums, fc_weight, fc_bias = (
                tuple(tensors[f"{name}.{m}"] for m in range(len(info["block_names"])))
                for name in ("sums", "fc_weight", "fc_bias")
            )
            shp = cls(
                sums,
                tensors["counts"],
                fc_weight,
                fc_bias,
                tuple(info["block_names"]),
                tuple(info["class_names"]),
                info["pooling"],
                info["bias"],
                info["layer_norm"],
            )
            _check_shapes(shp)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a complete SHP file ({error})") from error
        return shp


def _check_shapes(shp: SHP) -> None:
    K = len(shp.class_names)
    if shp.counts.shape != (K,):
        raise ValueError(f"counts {tuple(shp.counts.shape)} for {K} class names")
    for m, (sums, fc, bias) in enumerate(zip(shp.sums, shp.fc_weight, shp.fc_bias, strict=True)):
        if sums.ndim != 3 or len(sums) != K or fc.shape != sums.shape or bias.shape != (K,):
            raise ValueError(
                f"block {m + 1} has shapes {tuple(sums.shape)}, {tuple(fc.shape)} and "
                f"{tuple(bias.shape)} for {K} classes"
            )


def single_head_performance(
    model: nn.Module,
    probes: Probes,
    batches: Batches,
    *,
    pooling: str = "head",
    bias: bool = False,
    class_names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> SHP:
    """Measure the SHP matrices of all heads of all blocks in one pass over `batches`.

    Equal to one forward pass of the probe per head with the channels of all other heads set to
    zero, averaged over the images of every label; see docs/shp.md.

    Args:
        model: has `forward_with_heads`; moved to `device`, run in evaluation mode, modes restored.
        probes: what `train_probes` gave for this model.
        batches: (images, labels) batches, normally of images the probes were not trained on.
        pooling: "head" silences the other heads before sequence pooling, so that the token
            weights come from the head alone; "full" silences them after it.
        bias: add the linear layer's bias to the fields. Without it the field is the head's own.
        class_names: K names; by default "0", "1", ...
        device: where to work; by default where the model is.
        backend: of `ops.head_class_sums`.

    Returns:
        The matrices, as an `SHP`.

    Raises:
        ValueError: unknown pooling, no batches, labels, names or blocks that do not fit, heads
            that are not finite.
    """
    device = model_device(model, device)
    sums = HeadSums(probes, pooling, bias, class_names, device, backend)
    groups = GroupedSums(sums)
    with frozen(model, device), torch.no_grad():
        for batch in head_batches(model, batches, device):
            sums.add(batch)
            groups.end_batch()
    return groups.result()


class HeadSums:
    """Per-class sums of the pooled vectors of all heads, added up batch by batch in fp64."""

    def __init__(
        self,
        probes: Probes,
        pooling: str,
        bias: bool,
        class_names: Sequence[str] | None,
        device: torch.device,
        backend: str | None,
    ):
        if pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}; choose from {', '.join(POOLINGS)}")
        K = probes.num_classes
        self.names = tuple(map(str, range(K) if class_names is None else class_names))
        if len(self.names) != K:
            raise ValueError(f"{len(self.names)} class names for {K} classes")
        self.probes, self.pooling, self.bias, self.backend = probes, pooling, bias, backend
        self.weights = [p.pool_weight.to(device) for p in probes.blocks]
        self.sums = [
            torch.zeros(K, *w.shape, dtype=torch.float64, device=device) for w in self.weights
        ]
        self.counts = torch.zeros(K, dtype=torch.int64, device=device)

    def add(self, batch: HeadBatch, labels: Tensor | None = None) -> None:
        """Add one batch, counted under its own labels or under others of the same shape."""
        labels = batch.labels if labels is None else labels
        K = len(self.names)
        if batch.logits.shape[1] != K:
            raise ValueError(f"the model has {batch.logits.shape[1]} classes, the probes have {K}")
        fitting_blocks(self.probes, batch.heads)
        for total, x, weight in zip(self.sums, batch.heads, self.weights, strict=True):
            x = normalized(x, self.probes.layer_norm)
            total += _class_sums(x, weight, labels, K, self.pooling, self.backend)
        self.counts += torch.bincount(labels, minlength=K)

    def take(self) -> SHP:
        """What was added since the last call, on the CPU; starts again from zero."""
        for name, total in zip(self.probes.block_names, self.sums, strict=True):
            if not torch.isfinite(total).all():
                raise ValueError(f"the heads of {name} are not finite")
        shp = SHP(
            tuple(total.cpu().clone() for total in self.sums),
            self.counts.cpu().clone(),
            tuple(p.fc_weight for p in self.probes.blocks),
            tuple(p.fc_bias for p in self.probes.blocks),
            self.probes.block_names,
            self.names,
            self.pooling,
            self.bias,
            self.probes.layer_norm,
        )
        for total in (*self.sums, self.counts):
            total.zero_()
        return shp


class GroupedSums:
    """Adds batches up in groups of `GROUP`, then the groups: the order that shards keep too."""

    def __init__(self, sums: HeadSums):
        self.sums = sums
        self.waiting = 0
        self.total: SHP | None = None

    def end_batch(self) -> None:
        self.waiting += 1
        if self.waiting == GROUP:
            self._end_group()

    def result(self) -> SHP:
        if self.waiting or self.total is None:
            self._end_group()
        assert self.total is not None
        return self.total

    def _end_group(self) -> None:
        group = self.sums.take()
        self.total = group if self.total is None else add_shp(self.total, group)
        self.waiting = 0


def add_shp(first: SHP, second: SHP) -> SHP:
    """The SHP of two disjoint sets of images, measured with the same probes and options."""
    sums = tuple(a + b for a, b in zip(first.sums, second.sums, strict=True))
    return replace(first, sums=sums, counts=first.counts + second.counts)


def _class_sums(
    x: Tensor, weight: Tensor, labels: Tensor, K: int, pooling: str, backend: str | None
) -> Tensor:
    """Per-class sums (K, H, D) of the vectors pooled from heads (B, N, H, D)."""
    shape = weight.shape
    if pooling == "full":  # all channels as one head
        x, weight = x.flatten(2)[:, :, None], weight.reshape(1, -1)
    return ops.head_class_sums(x, weight, labels, K, backend=backend).sums.view(K, *shape)
