"""Batches of a training epoch: who gets which samples, the same for every pipeline and rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._hashing import make_key
from .augment_config import AugmentConfig
from .batches import Batches
from .dataset import ImageDataset
from .errors import DatasetError
from .mix import Mix, draw_mix, soft_targets


class Target(NamedTuple):
    """Where the batches go, and which part of each."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world_size: int = 1


class TrainingBatches(ABC):
    """Normalised images (b, C, H, W) and soft targets (b, K) fp32, epoch by epoch.

    The order of an epoch is a function of (seed, epoch). Step s takes the samples at
    s * batch_size and after. Mixing pairs the first sample of a step with the last, the second with
    the last but one, and so on; of these pairs rank r gets every world_size-th, so that it holds
    both images of each: the ranks together compute what one rank alone would.

    Args:
        dataset: copied to the device once.
        config: of augmentation and mixing.
        batch_size: images of a step, over all ranks.
        seed: of order, augmentation and mixing.
        target: device, dtype, and which part of each step.
        drop_last: leave out a last step that is not full.

    Attributes:
        images: the data set, uint8 (M, C, H, W), on the device.
        labels: (M,) int64, on the device.
        num_images: images of an epoch, over all ranks.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        config: AugmentConfig,
        batch_size: int,
        seed: int,
        target: Target,
        drop_last: bool,
    ) -> None:
        rank, world_size = target.rank, target.world_size
        if world_size < 1 or not 0 <= rank < world_size:
            raise DatasetError(f"rank must lie in 0..world_size-1, got {rank} of {world_size}")
        if world_size > 1 and (batch_size % (2 * world_size) or not drop_last):
            raise DatasetError(
                f"batch_size must be a multiple of 2 * world_size = {2 * world_size}, with "
                f"drop_last, for equal numbers of pairs; got {batch_size} and {drop_last}"
            )
        self._batches = Batches(
            dataset,
            batch_size,
            shuffle=True,
            seed=seed,
            device=target.device,
            drop_last=drop_last,
        )
        self.images, self.labels = self._batches.images, self._batches.labels
        self.num_classes, self.num_images = dataset.num_classes, len(dataset)
        if drop_last:
            self.num_images = len(self._batches) * batch_size
        self.config, self.seed, self.target = config, seed, target
        self.mean, self.std = config.mean or dataset.mean, config.std or dataset.std

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return len(self._batches)

    @abstractmethod
    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start`, `start` + 1, ... of one epoch."""

    def indices(self, epoch: int, start: int = 0) -> list[tuple[int, Tensor]]:
        """(step, sample numbers (b,) on the CPU) of this rank, from `start` on."""
        order, size = self._batches.order(epoch), self._batches.batch_size
        steps = range(start, len(self))
        return [(s, self._share(order[s * size : (s + 1) * size])) for s in steps]

    def _share(self, batch: Tensor) -> Tensor:
        rank, world_size = self.target.rank, self.target.world_size
        if world_size == 1:
            return batch
        first = torch.arange(rank, len(batch) // 2, world_size)
        return batch[torch.cat([first, len(batch) - 1 - first.flip(0)])]

    def mix(self, epoch: int, step: int) -> Mix:
        """How a step is mixed, the same on every rank."""
        c = self.config
        rng = np.random.default_rng(int(make_key("mix-1", self.seed, epoch, step)))
        return draw_mix(
            rng,
            *self.images.shape[-2:],
            mixup_alpha=c.mixup,
            cutmix_alpha=c.cutmix,
            prob=c.mix_prob,
            switch_prob=c.switch_prob,
        )

    def soft_targets(self, index: Tensor, weight: float) -> Tensor:
        """(b, K) fp32 of the samples `index`, which is on the device."""
        labels = self.labels.index_select(0, index)
        return soft_targets(labels, self.num_classes, weight, self.config.smoothing)


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor without waiting for the device."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t
