"""Augmentation by the native CPU kernels, an image at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import resize_tables


def augment(
    images: Tensor, index: Tensor, crops: Tensor, layers: Tensor, fill: list[int]
) -> Tensor:
    """Crop, resize, flip, then every layer in turn: (B, C, H, W) uint8."""
    vertical, horizontal = (resize_tables(size, images.device) for size in images.shape[2:])
    return torch.ops.lsmha_fast_C.augment(images, index, crops, layers, horizontal, vertical, fill)


def mix_and_erase(
    images: Tensor,
    boxes: Tensor,
    table: Tensor,
    noise: Tensor,
    weight: float,
    cut: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Mix, normalise, erase: (B, C, H, W) in `dtype`."""
    return torch.ops.lsmha_fast_C.mix_and_erase(images, boxes, table, noise, weight, cut).to(dtype)
