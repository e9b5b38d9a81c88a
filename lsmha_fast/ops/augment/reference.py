"""Augmentation of single images: the definition in plain PyTorch, byte for byte that of Pillow.

Pillow's sources (src/libImaging, ImageOps.py, ImageEnhance.py) say how each operation rounds; the
operations run one after another on bytes, as in timm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import (
    AFFINE,
    AUTO_CONTRAST,
    BICUBIC,
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    EQUALIZE,
    GOLDEN,
    INVERT,
    MULTIPLY_1,
    MULTIPLY_2,
    POSTERIZE,
    PRECISION,
    SHARPNESS,
    SOLARIZE,
    SOLARIZE_ADD,
    TAPS,
    resize_tables,
)


def augment(
    images: Tensor, index: Tensor, crops: Tensor, layers: Tensor, fill: list[int]
) -> Tensor:
    """Crop, resize, flip, then every layer in turn: (B, C, H, W) uint8."""
    x = resized_crop(images.index_select(0, index), crops.long())
    border = torch.tensor(fill, device=x.device)
    for layer in layers.unbind(1):
        out = x.clone()
        for code, operation in OPERATIONS.items():
            chosen = (layer[:, 0] == code).nonzero()[:, 0]
            if len(chosen):
                out[chosen] = operation(x[chosen], layer[chosen, 1:], border)
        x = out
    return x


def resized_crop(x: Tensor, crops: Tensor) -> Tensor:
    """Stretch each sample's box to the whole image, rows first; a byte in between, as in Pillow."""
    top, left, height, width, kind, flip = crops.unbind(1)
    x = _resize_rows(x, left, width, kind)
    x = _resize_rows(x.transpose(2, 3), top, height, kind).transpose(2, 3)
    return torch.where(flip.bool()[:, None, None, None], x.flip(3), x)


def _resize_rows(x: Tensor, start: Tensor, length: Tensor, kind: Tensor) -> Tensor:
    B, C, H, W = x.shape
    table = resize_tables(W, x.device)[kind, length].long()  # (B, W, 5)
    total = torch.full_like(x, 1 << (PRECISION - 1), dtype=torch.int64)
    for tap in range(TAPS):
        column = (table[..., 0] + tap).minimum(length[:, None] - 1) + start[:, None]  # (B, W)
        pixels = x.gather(3, column[:, None, None].expand(B, C, H, W))
        total += pixels * table[:, None, None, :, 1 + tap]
    return (total >> PRECISION).clamp(0, 255).to(torch.uint8)


def affine(x: Tensor, numbers: Tensor, border: Tensor) -> Tensor:
    """Sample at a * (column, row, 1), pixel centres at halves; `border` beyond the image."""
    _, _, H, W = x.shape
    kind, a, b, c, d, e, f = (v[:, None, None] for v in numbers.unbind(1))
    column = torch.arange(W, device=x.device, dtype=torch.float64) + 0.5  # (W,)
    row = torch.arange(H, device=x.device, dtype=torch.float64)[:, None] + 0.5  # (H, 1)
    u = a * column + b * row + c  # (n, H, W)
    v = d * column + e * row + f
    inside = (u >= 0) & (u < W) & (v >= 0) & (v < H)
    u, v = u - 0.5, v - 0.5
    left, top = u.floor(), v.floor()
    du, dv = (u - left)[:, None], (v - top)[:, None]
    cubic = _sample(x, left, top, du, dv, (-1, 0, 1, 2), _cubic)
    linear = _sample(x, left, top, du, dv, (0, 1), _linear)
    out = torch.where(kind[:, None] == BICUBIC, cubic, linear).clamp(0, 255).to(torch.uint8)
    return torch.where(inside[:, None], out, border.to(torch.uint8).view(1, -1, 1, 1))


def _sample(x, left, top, du, dv, taps, interpolate):
    """Interpolate along rows, then between them; pixels beyond the image repeat its edge."""
    n, C, H, W = x.shape
    flat = x.reshape(n, C, H * W).double()
    rows = []
    for dy in taps:
        y = (top.long() + dy).clamp(0, H - 1)
        at = [(y * W + (left.long() + dx).clamp(0, W - 1)).flatten(1) for dx in taps]
        pixels = [flat.gather(2, i[:, None].expand(n, C, -1)).view(n, C, H, W) for i in at]
        rows.append(interpolate(*pixels, du))
    return interpolate(*rows, dv)


def _linear(a, b, t):
    return a + (b - a) * t


def _cubic(a, b, c, d, t):
    """Pillow's cubic of `transform` (a = -1), in its order of operations."""
    return b + t * ((c - a) + t * ((2 * (a - b) + c - d) + t * (-a + b - c + d)))


def auto_contrast(x: Tensor, *_) -> Tensor:
    """Stretch each channel to 0..255."""
    low, high = x.amin((2, 3), keepdim=True).double(), x.amax((2, 3), keepdim=True).double()
    # 255.0 / tensor would multiply by the rounded reciprocal
    scale = torch.full_like(low, 255.0) / (high - low)
    # trunc and clamp: Pillow's table is int(), then cut
    stretched = (x.double() * scale + -low * scale).nan_to_num(0.0).trunc().clamp(0, 255)
    return torch.where(high > low, stretched.to(torch.uint8), x)


def equalize(x: Tensor, *_) -> Tensor:
    """Spread the histogram of each channel evenly."""
    n, C, H, W = x.shape
    flat = x.reshape(n, C, H * W).long()
    counts = torch.zeros(n, C, 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    brightest = counts.gather(2, flat.amax(2, keepdim=True))
    step = (H * W - brightest) // 255  # (n, C, 1); 0 also where there is one value alone
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before) // step.clamp_min(1)).clamp_max(255)
    return torch.where(step == 0, flat, table.gather(2, flat)).to(torch.uint8).view_as(x)


def invert(x: Tensor, *_) -> Tensor:
    """255 - x."""
    return 255 - x


def posterize(x: Tensor, numbers: Tensor, *_) -> Tensor:
    """Keep the upper bits; none leaves black."""
    low = (1 << (8 - _first(numbers).long())) - 1
    return (x & ~low).to(torch.uint8)


def solarize(x: Tensor, numbers: Tensor, *_) -> Tensor:
    """Invert what is not below the threshold."""
    return torch.where(x < _first(numbers), x, 255 - x)


def solarize_add(x: Tensor, numbers: Tensor, *_) -> Tensor:
    """Brighten what is below 128."""
    added = (x.long() + _first(numbers).long()).clamp_max(255).to(torch.uint8)
    return torch.where(x < 128, added, x)


def color(x: Tensor, numbers: Tensor, *_) -> Tensor:
    """Blend with the grey image."""
    return _blend(luma(x), x, numbers)


def contrast(x: Tensor, numbers: Tensor, *_) -> Tensor:
    """Blend with the mean grey."""
    grey = luma(x).long().sum((1, 2, 3), keepdim=True)
    mean = (grey.double() / (x.shape[2] * x.shape[3]) + 0.5).floor()
    return _blend(mean, x, numbers)


def brightness(x: Tensor, numbers: Tensor, *_) -> Tensor:
    """Blend with black."""
    return _blend(torch.zeros_like(x), x, numbers)


def sharpness(x: Tensor, numbers: Tensor, *_) -> Tensor:
    """Blend with the smoothed image, whose border is that of the image."""
    smooth = x.long()
    if min(x.shape[2:]) >= 3:
        around = x.long().unfold(2, 3, 1).unfold(3, 3, 1).sum((4, 5))
        inner = x[..., 1:-1, 1:-1].long()
        # (sum + 4 * middle) / 13, rounded; Pillow's floats never come near the halves
        smooth[..., 1:-1, 1:-1] = (2 * (around + 4 * inner) + 13) // 26
    return _blend(smooth, x, numbers)


def luma(x: Tensor) -> Tensor:
    """(n, 1, H, W): Pillow's conversion to grey; one channel is grey already."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.long().split(1, dim=1)
    return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).to(torch.uint8)


def _blend(base: Tensor, x: Tensor, numbers: Tensor) -> Tensor:
    """base + factor * (x - base) in fp32, cut to bytes."""
    base = base.float()
    return (base + _first(numbers).float() * (x.float() - base)).clamp(0, 255).to(torch.uint8)


def _first(numbers: Tensor) -> Tensor:
    return numbers[:, 0, None, None, None]


OPERATIONS = {
    AUTO_CONTRAST: auto_contrast,
    EQUALIZE: equalize,
    INVERT: invert,
    AFFINE: affine,
    POSTERIZE: posterize,
    SOLARIZE: solarize,
    SOLARIZE_ADD: solarize_add,
    COLOR: color,
    CONTRAST: contrast,
    BRIGHTNESS: brightness,
    SHARPNESS: sharpness,
}


def mix_and_erase(
    images: Tensor,
    boxes: Tensor,
    table: Tensor,
    noise: Tensor,
    weight: float,
    cut: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Mix with the reverse of the batch, normalise, erase: (B, C, H, W) in `dtype`."""
    B, C, H, W = images.shape
    if cut:
        top, bottom, left, right = cut
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
        images = mixed
    elif weight != 1.0:
        images = torch.round(images.float() * weight + images.flip(0).float() * (1 - weight))
    channel = torch.arange(C, device=images.device).view(1, C, 1, 1)
    x = table[channel, images.long()]
    return torch.where(_inside(boxes, H, W), noise[_levels(boxes[:, 4], C, H, W)], x).to(dtype)


def _inside(boxes: Tensor, H: int, W: int) -> Tensor:
    top, left, height, width = (v[:, None] for v in boxes[:, :4].unbind(1))
    y, x = torch.arange(H, device=boxes.device), torch.arange(W, device=boxes.device)
    rows, columns = (y >= top) & (y < top + height), (x >= left) & (x < left + width)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _levels(key: Tensor, C: int, H: int, W: int) -> Tensor:
    """16 bits for every pixel from SplitMix64; int64 stands for uint64."""

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    count = torch.arange(1, C * H * W + 1, device=key.device)
    x = key[:, None] + count * _signed(GOLDEN)
    x = (x ^ shifted(x, 30)) * _signed(MULTIPLY_1)
    x = (x ^ shifted(x, 27)) * _signed(MULTIPLY_2)
    return shifted(x ^ shifted(x, 31), 48).view(-1, C, H, W)


def _signed(word: int) -> int:
    return word - (1 << 64)
