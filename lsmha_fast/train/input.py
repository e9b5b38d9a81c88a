"""From the fields of a config to the training batches of `lsmha_fast.data`."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..data import AugmentConfig, ImageDataset, default_config, make_batches
from ..data.training_batches import TrainingBatches
from .config import TrainConfig


def augment_config(config: TrainConfig) -> AugmentConfig:
    """How the training images of a run are changed and mixed.

    Raises:
        ValueError: a policy that does not exist.
    """
    augment = replace(
        default_config(config.data),
        auto_augment=config.auto_augment,
        scale=config.crop_scale,
        ratio=config.crop_ratio,
        interpolation=config.interpolation,
        erase_prob=config.erase,
        mixup=config.mixup,
        cutmix=config.cutmix,
        mix_prob=config.mix_prob,
        switch_prob=config.mix_switch_prob,
        smoothing=config.label_smoothing,
    )
    if config.flip is not None:
        augment = replace(augment, hflip=config.flip)
    if config.augment:
        return augment
    return replace(
        augment,
        auto_augment="",
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        hflip=0.0,
        erase_prob=0.0,
        crop_padding=0,
    )


def make_train_batches(
    config: TrainConfig,
    dataset: ImageDataset,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> TrainingBatches:
    """The batches of `config.pipeline`, of which this process takes its part.

    Raises:
        ValueError: sizes that do not fit, or timm is missing.
    """
    return make_batches(
        dataset,
        batch_size=config.batch_size,
        pipeline=config.pipeline,
        config=augment_config(config),
        seed=config.seed,
        device=device,
        rank=rank,
        world_size=world_size,
        workers=config.workers,
        drop_last=config.drop_last,
    )
