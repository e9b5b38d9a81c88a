"""Probes: what each frozen block knows, read by sequence pooling and one linear layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .._files import atomic_file
from ._features import Batches, frozen, head_batches, model_device

_KIND = "lsmha_fast.probes/1"


class BlockProbe(NamedTuple):
    """The probe of one block, cut by heads."""

    pool_weight: Tensor  # (H, D): token score; its bias would cancel in the softmax
    fc_weight: Tensor  # (K, H, D)
    fc_bias: Tensor  # (K,)


@dataclass(frozen=True, eq=False)
class Probes:
    """The trained probes of all blocks.

    Attributes:
        blocks: one `BlockProbe` per transformer block, fp32, on the CPU.
        block_names: names of the blocks, by depth in the model.
        layer_norm: whether a LayerNorm (without affine part: what follows absorbs it) comes first.
        accuracy: of every probe on the validation batches, 0..1; None if there were none.
        model_accuracy: of the model itself on the same batches.
        settings: how the probes were trained.
    """

    blocks: tuple[BlockProbe, ...]
    block_names: tuple[str, ...]
    layer_norm: bool = False
    accuracy: tuple[float, ...] | None = None
    model_accuracy: float | None = None
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Labels K."""
        return self.blocks[0].fc_bias.numel()

    def logits(self, block: int, x: Tensor, *, backend: str | None = None) -> Tensor:
        """Logits (B, K) of probe number `block` (from 0) for its block's heads, (B, N, H, D)."""
        pool, fc, bias = (t.to(x.device) for t in self.blocks[block])
        pooled = pool_all(normalized(x.float(), self.layer_norm), pool, backend)
        return F.linear(pooled, fc.flatten(1), bias)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file; an interrupted call leaves an earlier file as it was."""
        from safetensors.torch import save

        info = {
            "kind": _KIND,
            "block_names": self.block_names,
            "layer_norm": self.layer_norm,
            "accuracy": self.accuracy,
            "model_accuracy": self.model_accuracy,
            "settings": dict(self.settings),
        }
        tensors = {
            f"{m}.{name}": t.contiguous()
            for m, probe in enumerate(self.blocks)
            for name, t in probe._asdict().items()
        }
        with atomic_file(path) as temporary:
            # not `save_file`, which makes files that only their owner can read
            temporary.write_bytes(save(tensors, metadata={"info": json.dumps(info)}))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Probes:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such probes file")
        try:
            with safe_open(path, framework="pt") as file:
                info = json.loads((file.metadata() or {})["info"])
                if info["kind"] != _KIND:
                    raise ValueError(f"holds {info['kind']!r}, expected {_KIND!r}")
                blocks = tuple(
                    BlockProbe(*(file.get_tensor(f"{m}.{name}") for name in BlockProbe._fields))
                    for m in range(len(info["block_names"]))
                )
            accuracy = info["accuracy"]
            probes = cls(
                blocks,
                tuple(info["block_names"]),
                info["layer_norm"],
                None if accuracy is None else tuple(accuracy),
                info["model_accuracy"],
                info["settings"],
            )
            _check_shapes(probes)
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise ValueError(f"{path}: not a readable probes file ({error})") from error
        return probes


def normalized(x: Tensor, layer_norm: bool) -> Tensor:
    """Heads (B, N, H, D) after the probe's optional LayerNorm over all H * D channels."""
    return F.layer_norm(x.float(), x.shape[2:]) if layer_norm else x


def pool_all(x: Tensor, weight: Tensor, backend: str | None) -> Tensor:
    """Pool heads (B, N, H, D) to (B, H * D) with one softmax over tokens from all channels."""
    return ops.seq_pool(x.flatten(2)[:, :, None], weight.reshape(1, -1), backend=backend)[:, 0]


def evaluate_probes(
    model: nn.Module,
    probes: Probes,
    batches: Batches,
    *,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Probes:
    """`probes` with their accuracy, and the model's own, measured on `batches` in one pass.

    Args:
        model: the frozen model that the probes read.
        probes: copied, not changed.
        batches: (images, labels).
        device: where to work; by default where the model is.
        backend: of the ops; the fastest by default.

    Returns:
        The copy with its accuracies.

    Raises:
        ValueError: no batches, labels or blocks that do not fit.
    """
    device = model_device(model, device)
    depth, count = len(probes.blocks), 0
    correct = torch.zeros(depth + 1, dtype=torch.int64, device=device)
    with frozen(model, device), torch.no_grad():
        for batch in head_batches(model, batches, device):
            fitting_blocks(probes, batch.heads)
            for m, x in enumerate(batch.heads):
                prediction = probes.logits(m, x, backend=backend).argmax(1)
                correct[m] += (prediction == batch.labels).sum()
            correct[depth] += (batch.logits.argmax(1) == batch.labels).sum()
            count += len(batch.labels)
    *accuracy, model_accuracy = (correct.double() / count).tolist()
    return replace(probes, accuracy=tuple(accuracy), model_accuracy=model_accuracy)


def fitting_blocks(probes: Probes, heads: tuple[Tensor, ...]) -> None:
    """Refuse heads whose number of blocks, heads or channels the probes were not trained for."""
    expected = [tuple(p.pool_weight.shape) for p in probes.blocks]
    found = [tuple(x.shape[2:]) for x in heads]
    if found != expected:
        raise ValueError(
            f"the probes fit blocks of (heads, channels) {expected}, the model has {found}"
        )


def _check_shapes(probes: Probes) -> None:
    K = probes.num_classes
    for m, (pool, fc, bias) in enumerate(probes.blocks):
        if pool.ndim != 2 or fc.shape != (K, *pool.shape) or bias.shape != (K,):
            raise ValueError(
                f"block {m + 1} has shapes {tuple(pool.shape)}, {tuple(fc.shape)} and "
                f"{tuple(bias.shape)}, expected (H, D), ({K}, H, D) and ({K},)"
            )
