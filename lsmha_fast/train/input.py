"""Training batches of a run: images and soft targets, a function of (seed, epoch, step)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..data import Batches, ImageDataset, default_augment, mixup_cutmix, normalize
from ..data._hashing import make_key
from .config import TrainConfig


class TrainBatches(Protocol):
    """What the loop asks of an input pipeline."""

    num_images: int

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (b, C, H, W), normalised, and targets (b, K) fp32 of step `start` and later."""


class LightBatches:
    """Crop, flip, erasing, mixup and CutMix, each batch from its own random numbers.

    Every rank makes the whole batch and takes its rows, so that the images of a step do not
    depend on the number of ranks.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        config: TrainConfig,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.config, self.dataset = config, dataset
        self.rank, self.world_size = rank, world_size
        self.batches = Batches(
            dataset,
            config.batch_size,
            shuffle=True,
            seed=config.seed,
            device=device,
            drop_last=config.drop_last,
        )
        self.num_images = len(dataset)
        if config.drop_last:
            self.num_images -= self.num_images % config.batch_size
        self.augment = None
        if config.augment:
            augment = default_augment(config.data)
            flip = augment.flip if config.flip is None else config.flip
            self.augment = replace(augment, flip=flip, erase_prob=config.erase)

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (b, C, H, W), normalised, and targets (b, K) fp32 of step `start` and later."""
        for step, (images, labels) in enumerate(self.batches.epoch(epoch, start), start):
            x, targets = self._transform(images, labels, epoch, step)
            yield x[self.rank :: self.world_size], targets[self.rank :: self.world_size]

    def _transform(
        self, images: Tensor, labels: Tensor, epoch: int, step: int
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        # on the CPU, so that drawing numbers never waits for the device
        key = int(make_key(config.seed, "augment", epoch, step)) >> 1
        generator = torch.Generator().manual_seed(key)
        x = normalize(images, self.dataset.mean, self.dataset.std)
        if self.augment is not None:
            x = self.augment(x, generator)
        return mixup_cutmix(
            x,
            labels,
            self.dataset.num_classes,
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            prob=config.mix_prob,
            switch_prob=config.mix_switch_prob,
            smoothing=config.label_smoothing,
            generator=generator,
        )


def make_train_batches(
    config: TrainConfig,
    dataset: ImageDataset,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> TrainBatches:
    """The input pipeline that a config asks for.

    Raises:
        ValueError: a pipeline that this version has not.
    """
    if config.pipeline != "light":
        raise ValueError(f"--pipeline {config.pipeline} is not there yet; use light")
    return LightBatches(dataset, config, device, rank, world_size)
