"""Batches of a data set that lies on the device as a whole, in an order that can be recomputed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._hashing import make_key
from .dataset import ImageDataset
from .errors import DatasetError


class Batches:
    """Iterates (uint8 images (B, 3, H, W), int64 labels (B,)) on `device`.

    The order is a function of (seed, epoch) alone, so a resumed run continues exactly:
    `batches.epoch(e, start=s)` gives batch s and all later ones of epoch e. Plain iteration gives
    the epoch set by `set_epoch`, at first 0.

    Args:
        dataset: copied to `device` once.
        batch_size: samples per batch, at least 1.
        shuffle: a new permutation every epoch, else the order of the data set.
        seed: of the permutations.
        device: where the tensors live.
        drop_last: leave out a last batch that is not full.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise DatasetError(f"batch_size must be >= 1, got {batch_size}")
        if drop_last and batch_size > len(dataset):
            raise DatasetError(
                f"batch_size {batch_size} with drop_last leaves no batch of {len(dataset)} images"
            )
        self.images = dataset.images.to(device)
        self.labels = dataset.labels.to(device)
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.drop_last = drop_last
        self.num_images = len(dataset)
        self._epoch = 0

    def __len__(self) -> int:
        """Batches per epoch."""
        full, rest = divmod(self.num_images, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of plain iteration."""
        self._epoch = epoch

    def order(self, epoch: int) -> Tensor:
        """Sample numbers of an epoch in their order, (M,) int64 on the CPU."""
        if not self.shuffle:
            return torch.arange(self.num_images)
        generator = torch.Generator().manual_seed(int(make_key(self.seed, epoch)) >> 1)
        return torch.randperm(self.num_images, generator=generator)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start`, `start` + 1, ... of one epoch."""
        order = self.order(epoch).to(self.labels.device)
        for i in range(start, len(self)):
            index = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield self.images.index_select(0, index), self.labels.index_select(0, index)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(self._epoch)


def normalize(
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(images / 255 - mean) / std per channel, computed in fp32.

    Args:
        images: (B, C, H, W) uint8.
        mean: C numbers, in units where 255 is 1.
        std: C numbers.
        dtype: of the result.

    Returns:
        (B, C, H, W) in `dtype`.
    """
    # the arithmetic of timm's prefetching loader, so that the bits agree
    mean_, std_ = (
        torch.tensor([255 * v for v in values], device=images.device).view(1, -1, 1, 1)
        for values in (mean, std)
    )
    return images.float().sub_(mean_).div_(std_).to(dtype)
