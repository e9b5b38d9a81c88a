"""The pipeline "recipe": timm's own transforms, FastCollateMixup and RandomErasing, the oracle.

The order is that of timm's loader with its prefetcher, which the published runs used: transforms to
bytes, mixing of the bytes, normalisation, erasing.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ._hashing import make_key
from .augment_config import AugmentConfig
from .batches import normalize
from .dataset import ImageDataset
from .errors import DatasetError, require
from .mix import soft_targets
from .training_batches import Target, TrainingBatches, to_device


class TimmBatches(TrainingBatches):
    """timm draws from global generators; they are seeded from (seed, epoch, sample number) before
    each sample, and from (seed, epoch, step) before each mixing, and put back after every batch.

    Args:
        workers: processes that transform images; the batches do not depend on how many.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        config: AugmentConfig,
        batch_size: int,
        seed: int,
        target: Target,
        drop_last: bool,
        workers: int = 0,
    ) -> None:
        super().__init__(dataset, config, batch_size, seed, target, drop_last)
        if batch_size % 2 or not drop_last:
            raise DatasetError(
                "timm mixes an even number of images: batch_size must be even and drop_last set, "
                f"got {batch_size} and {drop_last}"
            )
        self._timm = require("timm.data", "the pipeline recipe", extra="train")
        self._transforms = _Transforms(self._timm, dataset.images, config, self.mean, self.std)
        self._host_labels = dataset.labels.cpu()
        self._workers = workers
        self._mixup = None
        if config.mixup or config.cutmix:
            self._mixup = self._timm.FastCollateMixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mix_prob,
                switch_prob=config.switch_prob,
                mode="batch",
                label_smoothing=config.smoothing,
                num_classes=self.num_classes,
            )
        self._erasing = None
        if config.erase_prob:
            erasing = require("timm.data.random_erasing", "the pipeline recipe", extra="train")
            self._erasing = erasing.RandomErasing(
                config.erase_prob, mode=config.erase_mode, device="cpu"
            )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        steps = self.indices(epoch, start)
        keys = [[(i, self._key("image", epoch, i)) for i in rows.tolist()] for _, rows in steps]
        loader = DataLoader(
            self._transforms,
            batch_sampler=keys,
            num_workers=self._workers,
            collate_fn=list,
            generator=torch.Generator(),  # else it takes a number from the global one
        )
        batches = iter(loader)
        for step, rows in steps:
            with kept_random_state():
                x, targets = self._collate(next(batches), rows, epoch, step)
            device, dtype = self.target.device, self.target.dtype
            yield to_device(x.to(dtype), device), to_device(targets, device)

    def _collate(self, pictures, rows, epoch, step):
        labels = self._host_labels[rows]
        if self._mixup is None:
            x = torch.stack(pictures)
            targets = soft_targets(labels, self.num_classes, 1.0, self.config.smoothing)
        else:
            seed_all(self._key("mix", epoch, step))
            x, targets = self._mixup(list(zip(pictures, labels, strict=True)))
        x = normalize(x, self.mean, self.std)
        if self._erasing is not None:
            for image, row in zip(x, rows.tolist(), strict=True):
                seed_all(self._key("erase", epoch, row))
                self._erasing(image)
        return x, targets

    def _key(self, purpose: str, epoch: int, number: int) -> int:
        return int(make_key("timm-1", purpose, self.seed, epoch, number))


class _Transforms(Dataset):
    """Image by (sample number, key), through timm's transforms, as (C, H, W) uint8."""

    def __init__(self, timm: Any, images: Tensor, config: AugmentConfig, mean, std) -> None:
        # the function, since a module cannot be sent to another process
        self._picture = require("PIL.Image", "the pipeline recipe", extra="train").fromarray
        self._images = images
        self._transform = timm.create_transform(
            tuple(images.shape[1:]),
            is_training=True,
            use_prefetcher=True,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            color_jitter=None,  # timm's default of 0.4 is off beside an auto_augment
            auto_augment=config.auto_augment or None,
            interpolation=config.interpolation,
            mean=mean,
            std=std,
        )

    def __getitem__(self, item: tuple[int, int]) -> Tensor:
        index, key = item
        seed_all(key)
        return self._transform(self._picture(self._images[index].permute(1, 2, 0).numpy()))


def seed_all(key: int) -> None:
    """Seed the generators that timm draws from; no GPU's generator is touched."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key >> 1)


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Put the global generators back at the end."""
    state, numpy_state, torch_state = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
    )
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
