"""What every backend of augment shares: codes of the operations, tables of the resize."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# what a layer does; rotation, shears and translations are affine maps
NONE, AUTO_CONTRAST, EQUALIZE, INVERT, AFFINE, POSTERIZE = 0, 1, 2, 3, 4, 5
SOLARIZE, SOLARIZE_ADD, COLOR, CONTRAST, BRIGHTNESS, SHARPNESS = 6, 7, 8, 9, 10, 11
BILINEAR, BICUBIC = 0, 1

# columns of `crops`, of `layers` and of `boxes`
CROP, LAYER, BOX = 6, 8, 5

# step of the noise's counter and multipliers of its mixing function: those of SplitMix64
GOLDEN, MULTIPLY_1, MULTIPLY_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

# bits after the point of Pillow's resize weights
PRECISION = 22
TAPS = 4


@functools.cache
def resize_tables(size: int, device: torch.device) -> Tensor:
    """For every crop of 1..size pixels that is stretched to `size`: where to read and how much.

    Pillow's resize (`precompute_coeffs` in src/libImaging/Resample.c), whose filters are one pixel
    (bilinear) and two pixels (bicubic, a = -0.5) wide when it enlarges.

    Returns:
        (2, size + 1, size, 5) int32, by filter, crop and pixel: the first pixel that is read,
        counted from the start of the crop, and four weights of `PRECISION` bits.
    """
    crop = torch.arange(size + 1, dtype=torch.float64)[:, None]
    center = (torch.arange(size, dtype=torch.float64) + 0.5) * (crop / size)
    table = torch.zeros(2, size + 1, size, 1 + TAPS, dtype=torch.int32)
    for kind, support in ((BILINEAR, 1.0), (BICUBIC, 2.0)):
        first = (center - support + 0.5).trunc().clamp_min(0)
        last = torch.minimum((center + support + 0.5).trunc(), crop)
        weights, total = [], torch.zeros_like(center)
        for tap in range(TAPS):
            inside = first + tap < last
            weight = _filter(kind, tap + first - center + 0.5) * inside
            weights.append(weight)
            total = total + weight
        table[kind, ..., 0] = first.int()
        for tap, weight in enumerate(weights):
            part = (weight / total).nan_to_num(0.0) * 2**PRECISION
            table[kind, ..., 1 + tap] = (part + torch.copysign(torch.tensor(0.5), part)).int()
    return table.to(device)


def _filter(kind: int, x: Tensor) -> Tensor:
    x = x.abs()
    if kind == BILINEAR:
        return (1 - x).clamp_min(0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
