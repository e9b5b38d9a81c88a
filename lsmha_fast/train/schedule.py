"""The learning-rate curve."""

from __future__ import annotations

import math

from .config import TrainConfig


def cosine_lr(
    epoch: float, *, epochs: int, lr: float, min_lr: float, warmup_lr: float, warmup_epochs: float
) -> float:
    """Linear warm-up, then half a cosine that counts from epoch 0, then the last value for ever.

    Args:
        epoch: time since the start, in epochs, fractions allowed.
        epochs: length of the cosine.
        lr: peak of the cosine (at epoch 0; the warm-up hides its start).
        min_lr: value at the end.
        warmup_lr: value at the start of the warm-up.
        warmup_epochs: length of the warm-up.
    """
    if epoch < warmup_epochs:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup_epochs
    share = min(epoch / epochs, 1.0)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * share))


def config_lr(config: TrainConfig, epoch: int, share: float = 0.0) -> float:
    """Learning rate of a run `share` of the way through `epoch` (both count from 0)."""
    return cosine_lr(
        epoch if config.lr_per_epoch else epoch + share,
        epochs=config.epochs,
        lr=config.lr,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_epochs=config.warmup_epochs,
    )
