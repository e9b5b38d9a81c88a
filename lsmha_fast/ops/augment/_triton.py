"""Augmentation in Triton: a launch for the crop, one for each layer, one for mixing and erasing.

A program is one image (or one channel of it); the layers branch on its own code. Products and sums
are rounded apart (`enable_fp_fusion=False`), since Pillow's are; positions and cubics are fp64, as
in Pillow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import resize_tables

NONE = tl.constexpr(common.NONE)
AUTO_CONTRAST = tl.constexpr(common.AUTO_CONTRAST)
EQUALIZE = tl.constexpr(common.EQUALIZE)
INVERT = tl.constexpr(common.INVERT)
AFFINE = tl.constexpr(common.AFFINE)
POSTERIZE = tl.constexpr(common.POSTERIZE)
SOLARIZE = tl.constexpr(common.SOLARIZE)
SOLARIZE_ADD = tl.constexpr(common.SOLARIZE_ADD)
COLOR = tl.constexpr(common.COLOR)
CONTRAST = tl.constexpr(common.CONTRAST)
BRIGHTNESS = tl.constexpr(common.BRIGHTNESS)
SHARPNESS = tl.constexpr(common.SHARPNESS)
CROP, LAYER, BOX = (tl.constexpr(v) for v in (common.CROP, common.LAYER, common.BOX))
ROW = tl.constexpr(1 + common.TAPS)
BITS = tl.constexpr(common.PRECISION)
HALF = tl.constexpr(1 << (common.PRECISION - 1))
GOLDEN = tl.constexpr(common.GOLDEN)
MULTIPLY_1 = tl.constexpr(common.MULTIPLY_1)
MULTIPLY_2 = tl.constexpr(common.MULTIPLY_2)

# pixels at a time: four per thread, so that the fp64 cubic keeps its registers
TILE = 512
NUM_WARPS = 4


@triton.jit
def _to_byte(total):
    return tl.minimum(tl.maximum(total >> BITS, 0), 255)


@triton.jit
def _crop(
    images_ptr, index_ptr, crops_ptr, wide_ptr, high_ptr, out_ptr, C, H, W, TILE: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    crop = crops_ptr + b * CROP
    top, left = tl.load(crop), tl.load(crop + 1)
    height, width = tl.load(crop + 2), tl.load(crop + 3)
    kind, flip = tl.load(crop + 4), tl.load(crop + 5)
    wide_ptr += (kind * (W + 1) + width) * W * ROW
    high_ptr += (kind * (H + 1) + height) * H * ROW
    images_ptr += (tl.load(index_ptr + b) * C + c) * H * W
    out_ptr += (b * C + c) * H * W
    for start in range(0, H * W, TILE):
        i = start + tl.arange(0, TILE)
        mask = i < H * W
        y, x = i // W, i % W
        x = tl.where(flip != 0, W - 1 - x, x)
        wide, high = wide_ptr + x * ROW, high_ptr + y * ROW
        first_x = tl.load(wide, mask=mask, other=0)
        first_y = tl.load(high, mask=mask, other=0)
        total = tl.full([TILE], HALF, tl.int32)
        for v in tl.static_range(4):
            row = (top + tl.minimum(first_y + v, height - 1)) * W + left
            line = tl.full([TILE], HALF, tl.int32)
            for u in tl.static_range(4):
                at = row + tl.minimum(first_x + u, width - 1)
                pixel = tl.load(images_ptr + at, mask=mask, other=0).to(tl.int32)
                line += pixel * tl.load(wide + 1 + u, mask=mask, other=0)
            total += _to_byte(line) * tl.load(high + 1 + v, mask=mask, other=0)
        tl.store(out_ptr + i, _to_byte(total).to(tl.uint8), mask=mask)


@triton.jit
def _blend(base, factor, x):
    value = base + factor * (x - base)
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def _luma(x_ptr, i, mask, N, C: tl.constexpr):
    red = tl.load(x_ptr + i, mask=mask, other=0).to(tl.int32)
    if C == 1:
        return red
    green = tl.load(x_ptr + N + i, mask=mask, other=0).to(tl.int32)
    blue = tl.load(x_ptr + 2 * N + i, mask=mask, other=0).to(tl.int32)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit
def _cubic(a, b, c, d, t):
    return b + t * ((c - a) + t * ((2 * (a - b) + c - d) + t * (b - a - c + d)))


@triton.jit
def _line(x_ptr, left, y, t, mask, H, W, BICUBIC: tl.constexpr):
    """Interpolate in row y, which is repeated beyond the edges as its pixels are."""
    row = x_ptr + tl.minimum(tl.maximum(y, 0), H - 1) * W
    b = tl.load(row + tl.minimum(tl.maximum(left, 0), W - 1), mask=mask, other=0)
    c = tl.load(row + tl.minimum(left + 1, W - 1), mask=mask, other=0)
    b, c = b.to(tl.float64), c.to(tl.float64)
    if not BICUBIC:
        return b + (c - b) * t
    a = tl.load(row + tl.maximum(left - 1, 0), mask=mask, other=0).to(tl.float64)
    d = tl.load(row + tl.minimum(left + 2, W - 1), mask=mask, other=0).to(tl.float64)
    return _cubic(a, b, c, d, t)


@triton.jit
def _affine(
    x_ptr, layer, out_ptr, fill, H, W, C: tl.constexpr, TILE: tl.constexpr, BICUBIC: tl.constexpr
):
    a, b, c = tl.load(layer + 2), tl.load(layer + 3), tl.load(layer + 4)
    d, e, f = tl.load(layer + 5), tl.load(layer + 6), tl.load(layer + 7)
    for start in range(0, H * W, TILE):
        i = start + tl.arange(0, TILE)
        column = (i % W).to(tl.float64) + 0.5
        row = (i // W).to(tl.float64) + 0.5
        u = a * column + b * row + c
        v = d * column + e * row + f
        inside = (u >= 0) & (u < W) & (v >= 0) & (v < H) & (i < H * W)
        u = tl.where(inside, u, 0.5) - 0.5
        v = tl.where(inside, v, 0.5) - 0.5
        left, top = tl.floor(u), tl.floor(v)
        u, v = u - left, v - top
        left, top = left.to(tl.int32), top.to(tl.int32)
        for k in tl.static_range(C):
            channel = x_ptr + k * H * W
            if BICUBIC:
                value = _cubic(
                    _line(channel, left, top - 1, u, inside, H, W, BICUBIC),
                    _line(channel, left, top, u, inside, H, W, BICUBIC),
                    _line(channel, left, top + 1, u, inside, H, W, BICUBIC),
                    _line(channel, left, top + 2, u, inside, H, W, BICUBIC),
                    v,
                )
            else:
                upper = _line(channel, left, top, u, inside, H, W, BICUBIC)
                lower = _line(channel, left, top + 1, u, inside, H, W, BICUBIC)
                value = upper + (lower - upper) * v
            value = tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)
            value = tl.where(inside, value, (fill >> (8 * k)) & 255)
            tl.store(out_ptr + k * H * W + i, value.to(tl.uint8), mask=i < H * W)


@triton.jit
def _auto_contrast(x_ptr, out_ptr, N, TILE: tl.constexpr):
    low = tl.full([TILE], 255, tl.int32)
    high = tl.full([TILE], 0, tl.int32)
    for start in range(0, N, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(x_ptr + i, mask=i < N, other=0).to(tl.int32)
        low = tl.minimum(low, tl.where(i < N, x, 255))
        high = tl.maximum(high, x)
    low, high = tl.min(low, axis=0), tl.max(high, axis=0)
    scale = tl.full([], 255.0, tl.float64) / tl.maximum(high - low, 1).to(tl.float64)
    offset = -low.to(tl.float64) * scale
    for start in range(0, N, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(x_ptr + i, mask=i < N, other=0).to(tl.int32)
        value = (x.to(tl.float64) * scale + offset).to(tl.int32)
        value = tl.where(high > low, tl.minimum(tl.maximum(value, 0), 255), x)
        tl.store(out_ptr + i, value.to(tl.uint8), mask=i < N)


@triton.jit
def _equalize(x_ptr, out_ptr, N, TILE: tl.constexpr):
    counts = tl.zeros([256], tl.int32)
    for start in range(0, N, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(x_ptr + i, mask=i < N, other=0).to(tl.int32)
        counts += tl.histogram(x, 256, mask=i < N)
    level = tl.arange(0, 256)
    brightest = tl.max(tl.where(counts > 0, level, 0), axis=0)
    step = (N - tl.sum(tl.where(level == brightest, counts, 0), axis=0)) // 255
    before = tl.cumsum(counts, axis=0) - counts
    table = tl.minimum((step // 2 + before) // tl.maximum(step, 1), 255)
    table = tl.where(step > 0, table, level)
    for start in range(0, N, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(x_ptr + i, mask=i < N, other=0).to(tl.int32)
        tl.store(out_ptr + i, tl.gather(table, x, axis=0).to(tl.uint8), mask=i < N)


@triton.jit
def _color(x_ptr, out_ptr, factor, N, C: tl.constexpr, TILE: tl.constexpr):
    for start in range(0, N, TILE):
        i = start + tl.arange(0, TILE)
        grey = _luma(x_ptr, i, i < N, N, C).to(tl.float32)
        for k in tl.static_range(C):
            x = tl.load(x_ptr + k * N + i, mask=i < N, other=0).to(tl.float32)
            tl.store(out_ptr + k * N + i, _blend(grey, factor, x).to(tl.uint8), mask=i < N)


@triton.jit
def _mean_luma(x_ptr, N, C: tl.constexpr, TILE: tl.constexpr):
    total = tl.zeros([TILE], tl.int32)
    for start in range(0, N, TILE):
        i = start + tl.arange(0, TILE)
        total += tl.where(i < N, _luma(x_ptr, i, i < N, N, C), 0)
    mean = tl.sum(total, axis=0).to(tl.float64) / N
    return (mean + 0.5).to(tl.int32).to(tl.float32)


@triton.jit
def _sharpness(x_ptr, out_ptr, factor, H, W, TILE: tl.constexpr):
    for start in range(0, H * W, TILE):
        i = start + tl.arange(0, TILE)
        y, x = i // W, i % W
        inner = (y > 0) & (y < H - 1) & (x > 0) & (x < W - 1)
        pixel = tl.load(x_ptr + i, mask=i < H * W, other=0).to(tl.int32)
        total = 4 * pixel
        for v in tl.static_range(3):
            for u in tl.static_range(3):
                at = i + (v - 1) * W + (u - 1)
                total += tl.load(x_ptr + at, mask=inner, other=0).to(tl.int32)
        smooth = tl.where(inner, (2 * total + 13) // 26, pixel)
        value = _blend(smooth.to(tl.float32), factor, pixel.to(tl.float32))
        tl.store(out_ptr + i, value.to(tl.uint8), mask=i < H * W)


@triton.jit
def _by_value(x_ptr, out_ptr, code, level, factor, mean, N, TILE: tl.constexpr):
    """The operations in which a byte alone decides, and the copy."""
    for start in range(0, N, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(x_ptr + i, mask=i < N, other=0).to(tl.int32)
        if code == INVERT:
            value = 255 - x
        elif code == POSTERIZE:
            value = (x >> (8 - level)) << (8 - level)
        elif code == SOLARIZE:
            value = tl.where(x < level, x, 255 - x)
        elif code == SOLARIZE_ADD:
            value = tl.where(x < 128, tl.minimum(x + level, 255), x)
        elif (code == CONTRAST) | (code == BRIGHTNESS):
            value = _blend(mean, factor, x.to(tl.float32))
        else:
            value = x
        tl.store(out_ptr + i, value.to(tl.uint8), mask=i < N)


@triton.jit
def _layer(x_ptr, layers_ptr, stride, out_ptr, fill, H, W, C: tl.constexpr, TILE: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    layer = layers_ptr + b * stride
    code = tl.load(layer).to(tl.int32)
    number = tl.load(layer + 1)
    factor = number.to(tl.float32)
    N = H * W
    x_ptr += b * C * N
    out_ptr += b * C * N
    if code == AFFINE:
        if number != 0:
            _affine(x_ptr, layer, out_ptr, fill, H, W, C, TILE, True)
        else:
            _affine(x_ptr, layer, out_ptr, fill, H, W, C, TILE, False)
    elif code == AUTO_CONTRAST:
        for k in tl.static_range(C):
            _auto_contrast(x_ptr + k * N, out_ptr + k * N, N, TILE)
    elif code == EQUALIZE:
        for k in tl.static_range(C):
            _equalize(x_ptr + k * N, out_ptr + k * N, N, TILE)
    elif code == COLOR:
        _color(x_ptr, out_ptr, factor, N, C, TILE)
    elif code == SHARPNESS:
        for k in tl.static_range(C):
            _sharpness(x_ptr + k * N, out_ptr + k * N, factor, H, W, TILE)
    else:
        mean = 0.0
        if code == CONTRAST:
            mean = _mean_luma(x_ptr, N, C, TILE)
        _by_value(x_ptr, out_ptr, code, number.to(tl.int32), factor, mean, C * N, TILE)


def augment(
    images: Tensor, index: Tensor, crops: Tensor, layers: Tensor, fill: list[int]
) -> Tensor:
    """Crop, resize, flip, then every layer in turn: (B, C, H, W) uint8."""
    _, C, H, W = images.shape
    B = len(index)
    out = images.new_empty(B, C, H, W)
    if out.numel() == 0:
        return out
    high, wide = (resize_tables(size, images.device) for size in (H, W))
    options = {"TILE": TILE, "num_warps": NUM_WARPS, "enable_fp_fusion": False}
    _crop[B, C](images, index, crops, wide, high, out, C, H, W, **options)
    colour = sum(byte << 8 * k for k, byte in enumerate(fill))
    other = torch.empty_like(out) if layers.shape[1] else out
    for layer in layers.unbind(1):
        _layer[B,](out, layer, layer.stride(0), other, colour, H, W, C=C, **options)
        out, other = other, out
    return out


@triton.jit
def _mix_and_erase(
    images_ptr,
    boxes_ptr,
    table_ptr,
    noise_ptr,
    out_ptr,
    weight,
    rest,
    cut_top,
    cut_bottom,
    cut_left,
    cut_right,
    B,
    H,
    W,
    C: tl.constexpr,
    MIXUP: tl.constexpr,
    TILE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    size = C * H * W
    mask = i < size
    y, x = i // W % H, i % W
    value = tl.load(images_ptr + b * size + i, mask=mask, other=0).to(tl.int32)
    partner = images_ptr + (B - 1 - b) * size + i
    if MIXUP:
        other = tl.load(partner, mask=mask, other=0).to(tl.float32)
        mixed = value.to(tl.float32) * weight + other * rest
        # to the nearest whole number, ties to even: 2**23 leaves no bits behind the point
        value = ((mixed + 8388608.0) - 8388608.0).to(tl.int32)
    else:
        cut = (y >= cut_top) & (y < cut_bottom) & (x >= cut_left) & (x < cut_right)
        other = tl.load(partner, mask=mask & cut, other=0).to(tl.int32)
        value = tl.where(cut, other, value)
    normal = tl.load(table_ptr + i // (H * W) * 256 + value, mask=mask, other=0.0)
    box = boxes_ptr + b * BOX
    top, left = tl.load(box), tl.load(box + 1)
    erased = (y >= top) & (y < top + tl.load(box + 2))
    erased &= (x >= left) & (x < left + tl.load(box + 3)) & mask
    word = tl.load(box + 4).to(tl.uint64, bitcast=True) + (i + 1).to(tl.uint64) * GOLDEN
    word = (word ^ (word >> 30)) * MULTIPLY_1
    word = (word ^ (word >> 27)) * MULTIPLY_2
    level = ((word ^ (word >> 31)) >> 48).to(tl.int32)
    noise = tl.load(noise_ptr + level, mask=erased, other=0.0)
    out = tl.where(erased, noise, normal).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + b * size + i, out, mask=mask)


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
    B, C, H, W = images.shape
    out = images.new_empty(images.shape, dtype=dtype)
    if out.numel():
        _mix_and_erase[B, triton.cdiv(C * H * W, TILE)](
            images,
            boxes,
            table,
            noise,
            out,
            weight,
            1 - weight,
            *(cut or [0, 0, 0, 0]),
            B,
            H,
            W,
            C=C,
            MIXUP=weight != 1.0 and not cut,
            TILE=TILE,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return out


def aot_configs():
    """Every kernel of this op for shapes of real models, for `tests/aot.py`."""
    sizes = {"H": "i32:16", "W": "i32:16"}
    yield (
        _crop,
        {
            "images_ptr": "*u8:16",
            "index_ptr": "*i64:16",
            "crops_ptr": "*i32:16",
            "wide_ptr": "*i32:16",
            "high_ptr": "*i32:16",
            "out_ptr": "*u8:16",
            "C": "i32",
            **sizes,
        },
        {"TILE": TILE},
        NUM_WARPS,
        3,
    )
    for channels in (1, 3):
        pointers = {"x_ptr": "*u8:16", "layers_ptr": "*fp64:16", "stride": "i32:16"}
        rest = {"out_ptr": "*u8:16", "fill": "i32", **sizes}
        yield _layer, pointers | rest, {"C": channels, "TILE": TILE}, NUM_WARPS, 3
    for mixup, dtype in ((True, "bf16"), (False, "bf16"), (True, "fp32")):
        signature = {
            "images_ptr": "*u8:16",
            "boxes_ptr": "*i64:16",
            "table_ptr": "*fp32:16",
            "noise_ptr": "*fp32:16",
            "out_ptr": f"*{dtype}:16",
            "weight": "fp32",
            "rest": "fp32",
            **dict.fromkeys(("cut_top", "cut_bottom", "cut_left", "cut_right"), "i32"),
            "B": "i32:16",
            **sizes,
        }
        yield _mix_and_erase, signature, {"C": 3, "MIXUP": mixup, "TILE": TILE}, NUM_WARPS, 3
