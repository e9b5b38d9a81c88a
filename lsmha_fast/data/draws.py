"""What augmentation does to each sample, drawn from (seed, epoch, sample number) alone.

The distributions are timm's: RandomResizedCropAndInterpolation, RandomHorizontalFlip, RandAugment
with the increasing set, RandomErasing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.augment import common as codes
from ._hashing import SampleDraws, make_key
from .augment_config import AugmentConfig, RandAugment

# timm draws again, up to ten times, until a box fits
ATTEMPTS = 10
ERASE_AREA, ERASE_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
# timm's increasing set, in its order, with the code that does it
OPERATIONS = (
    ("AutoContrast", codes.AUTO_CONTRAST),
    ("Equalize", codes.EQUALIZE),
    ("Invert", codes.INVERT),
    ("Rotate", codes.AFFINE),
    ("PosterizeIncreasing", codes.POSTERIZE),
    ("SolarizeIncreasing", codes.SOLARIZE),
    ("SolarizeAdd", codes.SOLARIZE_ADD),
    ("ColorIncreasing", codes.COLOR),
    ("ContrastIncreasing", codes.CONTRAST),
    ("BrightnessIncreasing", codes.BRIGHTNESS),
    ("SharpnessIncreasing", codes.SHARPNESS),
    ("ShearX", codes.AFFINE),
    ("ShearY", codes.AFFINE),
    ("TranslateXRel", codes.AFFINE),
    ("TranslateYRel", codes.AFFINE),
)
NAMES = tuple(name for name, _ in OPERATIONS)
CODES = np.array([code for _, code in OPERATIONS])


class Plan(NamedTuple):
    """Arguments of `ops.augment` and `ops.mix_and_erase` for some samples.

    Attributes:
        crops: (n, 6) int32.
        layers: (n, L, 8) fp64.
        boxes: (n, 5) int64.
    """

    crops: Tensor
    layers: Tensor
    boxes: Tensor


def draw_plan(config: AugmentConfig, seed: int, epoch: int, index: Tensor, H: int, W: int) -> Plan:
    """Draw for the samples `index` (n,) of an epoch; equal samples get equal rows."""
    samples = index.numpy()
    crops = _draws("crop", seed, epoch, samples)
    layers = _draws("layers", seed, epoch, samples)
    boxes = _draws("erase", seed, epoch, samples)
    arrays = (
        draw_crops(crops, config, H, W),
        draw_layers(layers, config, H, W),
        draw_boxes(boxes, config, H, W),
    )
    return Plan(*(torch.from_numpy(a) for a in arrays))


def _draws(purpose: str, seed: int, epoch: int, samples: np.ndarray) -> SampleDraws:
    # the number is the version of the scheme: other draws, another number
    return SampleDraws(make_key("augment-1", purpose, seed, epoch), samples)


def draw_crops(draws: SampleDraws, config: AugmentConfig, H: int, W: int) -> np.ndarray:
    """(n, 6) int32: box, filter, flip."""
    size, position, chance = draws.uniform(ATTEMPTS, 2), draws.uniform(2), draws.uniform(2)
    h, w, fits = _sides(size, config.scale, config.ratio, H, W)
    fits &= (h <= H) & (w <= W)
    center_h, center_w = _largest(config.ratio, H, W)
    h, w, fitted = _first_fit(h, w, fits, (center_h, center_w))
    top = np.where(fitted, np.floor(position[:, 0] * (H - h + 1)), (H - center_h) // 2)
    left = np.where(fitted, np.floor(position[:, 1] * (W - w + 1)), (W - center_w) // 2)
    kind = _filters(chance[:, 0], config.interpolation)
    flip = chance[:, 1] < config.hflip
    return np.stack([top, left, h, w, kind, flip], axis=1).astype(np.int32)


def draw_boxes(draws: SampleDraws, config: AugmentConfig, H: int, W: int) -> np.ndarray:
    """(n, 5) int64: the erased box, of height 0 where there is none, and the word of its noise."""
    size, position = draws.uniform(ATTEMPTS, 2), draws.uniform(3)
    # timm's erasing means height/width by its aspect, its crop width/height
    w, h, fits = _sides(size, ERASE_AREA, ERASE_ASPECT, H, W)
    fits &= (h < H) & (w < W)
    h, w, fitted = _first_fit(h, w, fits, (0, 0))
    h = np.where(position[:, 2] < config.erase_prob, h, 0)
    top = np.floor(position[:, 0] * (H - h + 1))
    left = np.floor(position[:, 1] * (W - w + 1))
    out = np.stack([top, left, h, w, h], axis=1).astype(np.int64)
    out[:, 4] = draws.words(1)[:, 0].view(np.int64)
    return out


def _sides(size, area, aspect, H, W):
    """Heights and widths (n, ATTEMPTS) of boxes of random area and width/height ratio."""
    low, high = (math.log(v) for v in aspect)
    pixels = (area[0] + (area[1] - area[0]) * size[..., 0]) * (H * W)
    ratio = np.exp(low + (high - low) * size[..., 1])
    w, h = np.rint(np.sqrt(pixels * ratio)), np.rint(np.sqrt(pixels / ratio))
    return h, w, (h >= 1) & (w >= 1)


def _first_fit(h, w, fits, otherwise):
    first = fits.argmax(1)[:, None]
    fitted = fits.any(1)
    h, w = (np.take_along_axis(side, first, 1)[:, 0] for side in (h, w))
    return np.where(fitted, h, otherwise[0]), np.where(fitted, w, otherwise[1]), fitted


def _largest(ratio: tuple[float, float], H: int, W: int) -> tuple[int, int]:
    """Sides of the largest box in the middle whose width/height is allowed."""
    if ratio[0] > W / H:
        return round(W / ratio[0]), W
    if ratio[1] < W / H:
        return H, round(H * ratio[1])
    return H, W


def _filters(chance: np.ndarray, interpolation: str) -> np.ndarray:
    if interpolation == "random":
        return np.where(chance < 0.5, codes.BILINEAR, codes.BICUBIC)
    kind = codes.BICUBIC if interpolation == "bicubic" else codes.BILINEAR
    return np.full(chance.shape, kind)


def draw_layers(draws: SampleDraws, config: AugmentConfig, H: int, W: int) -> np.ndarray:
    """(n, L, 8) fp64: the operations and their numbers."""
    policy = config.rand_augment() or RandAugment(layers=0)
    L = policy.layers
    chosen = draws.integers(0, len(NAMES) - 1, L)
    applied, up, kind = np.moveaxis(draws.uniform(L, 3), 2, 0)
    magnitude = np.clip(policy.magnitude + policy.std * draws.normal(L), 0, 10)
    sign = np.where(up > 0.5, -1.0, 1.0)
    kind = _filters(kind, config.interpolation)
    out = layer_rows(chosen, magnitude, sign, kind, H, W)
    out[applied > policy.prob] = codes.NONE
    return out


def layer_rows(
    chosen: np.ndarray, magnitude: np.ndarray, sign: np.ndarray, kind: np.ndarray, H: int, W: int
) -> np.ndarray:
    """Rows of `ops.augment`'s layers for operations of given magnitude: (..., 8) fp64.

    Args:
        chosen: (...) positions in `NAMES`.
        magnitude: (...) in [0, 10].
        sign: (...) 1 or -1, for the operations that have a direction.
        kind: (...) filter of the affine maps.
        H: height of the images.
        W: width.
    """
    out = np.zeros((*chosen.shape, codes.LAYER))
    out[..., 0] = CODES[chosen]
    number = np.zeros(chosen.shape)
    for i, name in enumerate(NAMES):
        here = chosen == i
        if name == "PosterizeIncreasing":
            number[here] = 4 - np.trunc(magnitude[here] / 10 * 4)
        elif name == "SolarizeIncreasing":
            number[here] = 256 - np.minimum(256, np.trunc(magnitude[here] / 10 * 256))
        elif name == "SolarizeAdd":
            number[here] = np.minimum(128, np.trunc(magnitude[here] / 10 * 110))
        elif CODES[i] >= codes.COLOR:
            # the difference from 1 as timm rounds it
            number[here] = np.maximum(0.1, 1 + magnitude[here] / 10 * 0.9 * sign[here])
        elif CODES[i] == codes.AFFINE:
            number[here] = kind[here]
            out[here, 2:] = _matrices(name, magnitude[here] / 10, sign[here], H, W)
    out[..., 1] = number
    return out


def _matrices(name: str, level: np.ndarray, sign: np.ndarray, H: int, W: int) -> np.ndarray:
    """(n, 6): where the pixels of the result are read."""
    out = np.tile([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], (len(level), 1))
    if name == "Rotate":
        angles = level * 30.0 * sign
        rows = [_rotation(angle, H, W) for angle in angles.tolist()]
        return np.array(rows).reshape(-1, 6)
    if name == "ShearX":
        out[:, 1] = level * 0.3 * sign
    elif name == "ShearY":
        out[:, 3] = level * 0.3 * sign
    elif name == "TranslateXRel":
        out[:, 2] = level * 0.45 * sign * W
    else:
        out[:, 5] = level * 0.45 * sign * H
    return out


def _rotation(degrees: float, H: int, W: int) -> list[float]:
    """Pillow's matrix for `rotate`: about the middle, rounded to 15 decimals before the shift."""
    angle = -math.radians(degrees % 360.0)
    cos, sin, back = (round(v, 15) for v in (math.cos(angle), math.sin(angle), -math.sin(angle)))
    x, y = W / 2, H / 2
    return [cos, sin, cos * -x + sin * -y + 0.0 + x, back, cos, back * -x + cos * -y + 0.0 + y]
