"""Augmentation of images of a resident data set: public functions, schemas, fake kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._ext import cpp_check
from .._dispatch import always, impl, load_backend, resolve_backend, triton_check
from .common import BOX, CROP, LAYER

CHECKS = {
    "reference": always,
    "triton": lambda images: triton_check(images, (torch.uint8,)),
    "cpp": lambda images: cpp_check(images, (torch.uint8,)),
}
# by device, fastest first; Triton's interpreter is for tests that name it
ORDER = {"cuda": ("triton",), "cpu": ("cpp",)}
LEVELS = 1 << 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

torch.library.define(
    "lsmha_fast::augment",
    "(Tensor images, Tensor index, Tensor crops, Tensor layers, int[] fill, str backend) -> Tensor",
)
torch.library.define(
    "lsmha_fast::mix_and_erase",
    "(Tensor images, Tensor boxes, Tensor table, Tensor noise, float weight, int[] cut,"
    " ScalarType dtype, str backend) -> Tensor",
)


@impl("lsmha_fast::augment")
def _augment_impl(images, index, crops, layers, fill, backend):
    return load_backend(__package__, backend).augment(images, index, crops, layers, fill)


@torch.library.register_fake("lsmha_fast::augment")
def _augment_fake(images, index, crops, layers, fill, backend):
    return images.new_empty(index.shape[0], *images.shape[1:])


@impl("lsmha_fast::mix_and_erase")
def _mix_and_erase_impl(images, boxes, table, noise, weight, cut, dtype, backend):
    module = load_backend(__package__, backend)
    return module.mix_and_erase(images, boxes, table, noise, weight, cut, dtype)


@torch.library.register_fake("lsmha_fast::mix_and_erase")
def _mix_and_erase_fake(images, boxes, table, noise, weight, cut, dtype, backend):
    return images.new_empty(images.shape, dtype=dtype)


def augment(
    images: Tensor,
    index: Tensor,
    crops: Tensor,
    layers: Tensor,
    fill: Sequence[int],
    *,
    backend: str | None = None,
) -> Tensor:
    """Take images out of a data set, and crop, flip and change each in its own way.

    Every byte is the one that Pillow computes when it crops and resizes, mirrors, and applies the
    operations one after another (tested); a sample's result depends on its own row of the
    arguments alone.

    Args:
        images: (M, C, H, W) uint8, the data set; C is 1 or 3.
        index: (B,) int64, which images.
        crops: (B, 6) int32: top, left, height, width of the box that is stretched to H x W; the
            filter (0 bilinear, 1 bicubic); 1 to mirror the result left to right.
        layers: (B, L, 8) fp64: what is done then, L times. First the code in `common`, then a
            number: the filter of AFFINE, the bits of POSTERIZE, the threshold of SOLARIZE, what
            SOLARIZE_ADD adds, the factor of COLOR, CONTRAST, BRIGHTNESS and SHARPNESS. Last, for
            AFFINE, a..f: pixel (x, y) is read at (a x + b y + c, d x + e y + f).
        fill: C bytes, the colour that AFFINE shows beyond the image.
        backend: "reference", "triton" or "cpp"; by default the fastest one for `images.device`.

    Returns:
        (B, C, H, W) uint8.

    Raises:
        ValueError: shapes or dtypes that do not fit; unknown backend. The contents of `crops` and
            `layers` are the caller's business; an index or a box out of range is an error of the
            C++ kernels and undefined on a GPU.
        RuntimeError: the named backend cannot run this call.
    """
    _check_images("augment", images)
    B = len(index)
    _check("augment", "index", index, (B,), torch.int64)
    _check("augment", "crops", crops, (B, CROP), torch.int32)
    _check("augment", "layers", layers, (B, layers.shape[1], LAYER), torch.float64)
    if len(fill) != images.shape[1] or not all(0 <= v <= 255 for v in fill):
        raise ValueError(f"augment: fill must be {images.shape[1]} bytes, got {list(fill)}")
    backend = resolve_backend("augment", backend, CHECKS, ORDER.get(images.device.type, ()), images)
    arguments = images.contiguous(), index, crops.contiguous(), layers.contiguous(), list(fill)
    return torch.ops.lsmha_fast.augment.default(*arguments, backend)


def mix_and_erase(
    images: Tensor,
    boxes: Tensor,
    table: Tensor,
    noise: Tensor,
    *,
    weight: float = 1.0,
    cut: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Mix the bytes of a batch with its own reverse, normalise, erase a box of each image.

    The order and the arithmetic are those of timm's loader with its prefetcher: Mixup's bytes are
    round(weight * x[b] + (1 - weight) * x[B - 1 - b]) in fp32; CutMix puts a box of x[B - 1 - b]
    into x[b]. All backends give the same bits.

    Args:
        images: (B, C, H, W) uint8; C is 1 or 3.
        boxes: (B, 5) int64: top, left, height, width of what is erased, and a random word. The
            noise of pixel i is `noise[SplitMix64(word + (i + 1) * golden) >> 48]`.
        table: (C, 256) fp32, the normalised value of each byte.
        noise: (65536,) fp32, equally likely values of an erased pixel.
        weight: Mixup's share of the image itself; 1 does not mix.
        cut: CutMix's box (top, bottom, left, right); empty where there is none.
        dtype: of the result: float32, bfloat16 or float16.
        backend: "reference", "triton" or "cpp"; by default the fastest one for `images.device`.

    Returns:
        (B, C, H, W) in `dtype`.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit; unknown backend.
        RuntimeError: the named backend cannot run this call.
    """
    _check_images("mix_and_erase", images)
    B, C, H, W = images.shape
    _check("mix_and_erase", "boxes", boxes, (B, BOX), torch.int64)
    _check("mix_and_erase", "table", table, (C, 256), torch.float32)
    _check("mix_and_erase", "noise", noise, (LEVELS,), torch.float32)
    if cut and (len(cut) != 4 or not (0 <= cut[0] <= cut[1] <= H and 0 <= cut[2] <= cut[3] <= W)):
        raise ValueError(
            f"mix_and_erase: cut must be (top, bottom, left, right) in {H}x{W}, got {list(cut)}"
        )
    if not 0 <= weight <= 1 or dtype not in DTYPES:
        raise ValueError(
            f"mix_and_erase: weight must lie in [0, 1] and dtype be float32, bfloat16 or float16, "
            f"got {weight} and {dtype}"
        )
    order = ORDER.get(images.device.type, ())
    backend = resolve_backend("mix_and_erase", backend, CHECKS, order, images)
    tensors = (t.contiguous() for t in (images, boxes, table, noise))
    return torch.ops.lsmha_fast.mix_and_erase.default(*tensors, weight, list(cut), dtype, backend)


def _check_images(op: str, images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
        raise ValueError(
            f"{op}: images must be uint8 (B, 1 or 3, H, W), "
            f"got {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        )


def _check(op: str, name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(t.shape) != shape or t.dtype != dtype:
        raise ValueError(
            f"{op}: {name} must be {str(dtype).removeprefix('torch.')} {shape}, "
            f"got {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"
        )
