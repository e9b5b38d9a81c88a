"""The concatenated heads of every block of a frozen model: one forward pass per batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._disk import DiskStore, StoredBatch
from .units import UnitView

Batches = Iterable[tuple[Tensor, Tensor]]


class HeadBatch(NamedTuple):
    """What one batch gives: the model's logits and the heads of every block."""

    logits: Tensor  # (B, K)
    heads: tuple[Tensor, ...]  # one (B, N, H, D) per block, before the output projection
    labels: Tensor  # (B,), int64


def model_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """`device`, or where the model's first parameter lies."""
    if device is not None:
        return torch.device(device)
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def block_names(model: nn.Module, depth: int) -> tuple[str, ...]:
    """The model's own names of its blocks, or "block 1", "block 2", ..."""
    names = tuple(getattr(model, "block_names", ())) or tuple(
        f"block {m + 1}" for m in range(depth)
    )
    if len(names) != depth or len(set(names)) != depth:
        raise ValueError(f"the model gives the heads of {depth} blocks but names them {names}")
    return names


@contextlib.contextmanager
def frozen(model: nn.Module, device: torch.device) -> Iterator[None]:
    """`model` on `device` in evaluation mode; the modes of its modules come back at the end."""
    modes = {module: module.training for module in model.modules()}
    model.to(device).eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def reiterable(batches: Batches, name: str) -> Batches:
    """`batches`, refused when a second pass over it would find it empty."""
    if iter(batches) is batches:
        raise ValueError(
            f"{name} is a one-way iterator ({type(batches).__name__}); "
            "give a list or a loader that can be iterated again"
        )
    return batches


def head_batches(model: nn.Module, batches: Batches, device: torch.device) -> Iterator[HeadBatch]:
    """Run the frozen model over `batches`, without gradients.

    Raises:
        ValueError: neither `forward_with_heads` nor attention of this package, no batch at all,
            labels that do not fit the images or the model's outputs.
    """
    own = getattr(model, "forward_with_heads", None)
    forward = UnitView(model, "heads").forward_with_heads if own is None else own
    empty = True
    for images, labels in batches:
        with torch.no_grad():
            logits, heads = forward(images.to(device))
        labels = labels.to(device, torch.int64)
        _check(logits, labels)
        empty = False
        yield HeadBatch(logits, tuple(heads), labels)
    if empty:
        raise ValueError("there are no batches to read")


def _check(logits: Tensor, labels: Tensor) -> None:
    B, K = logits.shape
    if labels.shape != (B,):
        raise ValueError(f"{B} images came with labels of shape {tuple(labels.shape)}")
    if B and (int(labels.min()) < 0 or int(labels.max()) >= K):
        raise ValueError(
            f"labels {int(labels.min())}..{int(labels.max())} do not fit the model's {K} classes"
        )


Features = tuple[tuple[Tensor, ...], Tensor]  # heads of every block, labels


class CachedHeads:
    """(heads, labels) of every batch, stored after the first pass while they fit.

    Features are rounded to `dtype` whether they are stored or recomputed, so the budgets change
    the time and not the result.

    Args:
        model: has `forward_with_heads`; in evaluation mode while this is iterated.
        batches: (images, labels) batches that can be iterated again and again.
        device: where the model and the features are.
        dtype: of the features.
        cache_bytes: at most this much is stored in memory, of the first batches.
        disk_bytes: at most this much is stored in files, of the others. What fits into neither
            makes every pass recompute all.
        disk_folder: where a folder for them is made; by default where temporary files go. It
            vanishes with this object.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        device: torch.device,
        dtype: torch.dtype,
        cache_bytes: int,
        disk_bytes: int = 0,
        disk_folder: str | Path | None = None,
    ):
        self.model = model
        self.batches = batches
        self.device = device
        self.dtype = dtype
        self.cache_bytes = cache_bytes
        self.disk = DiskStore(disk_bytes, disk_folder)
        self.cached: list[Features | StoredBatch] | None = None
        self.fits = True  # until a pass has shown that it does not

    def __iter__(self) -> Iterator[Features]:
        if self.cached is not None:
            for stored in self.cached:
                yield stored.read(self.device) if isinstance(stored, StoredBatch) else stored
            return
        room, kept = self.cache_bytes, list[Features | StoredBatch]()
        self.disk.clear()  # of a pass that was broken off
        for batch in head_batches(self.model, self.batches, self.device):
            heads = tuple(self._rounded(m, x) for m, x in enumerate(batch.heads))
            features = heads, batch.labels
            size = batch.labels.nbytes + sum(x.nbytes for x in heads)
            entry: Features | StoredBatch | None = None
            if self.fits and size <= room:
                room -= size
                entry = features
            elif self.fits:
                room = 0  # so that what lies in memory is always a beginning
                entry = self.disk.write(features)
            if entry is not None:
                kept.append(entry)
            elif self.fits:
                self.fits = False
                kept.clear()
                self.disk.clear()
            yield features
        if self.fits:
            self.cached = kept

    def _rounded(self, block: int, x: Tensor) -> Tensor:
        # a copy: a view would keep the whole packed tensor it lies in alive
        x = x.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        if not torch.isfinite(x).all():
            raise ValueError(
                f"heads of block {block + 1} are not finite in {self.dtype}; "
                "if the model itself is sound, store them in torch.float32"
            )
        return x
