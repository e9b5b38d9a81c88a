"""One layer of the convolutional tokenizer: public function, schema, fake kernels, autograd."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._ext import cpp_check, cuda_check
from .._dispatch import always, call, impl, load_backend, resolve_backend, triton_check
from .common import window_count

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# products in one sum of the native CPU kernels, which keep a patch in vectors
CPP_DEPTH = 47
# the widest image of the CUDA kernels, a few rows of which stand in shared memory
CUDA_WIDTH = 960


class Pool(NamedTuple):
    """Max pooling: window, step and border of minus infinity, in positions of the convolution."""

    kernel: int = 3
    stride: int = 2
    padding: int = 1


# the pooling of the published models, and one that changes nothing
CCT_POOL = Pool()
NO_POOL = Pool(1, 1, 0)


def _cpp_check(x, weight, *_):
    if math.prod(weight.shape[1:]) > CPP_DEPTH:
        return f"it sums at most {CPP_DEPTH} products, weight is {tuple(weight.shape)}"
    return cpp_check(x, (torch.float32, torch.bfloat16))


def _cuda_check(x, weight, stride, padding, pool):
    C, CIN, kernel = weight.shape[:3]
    if (kernel, stride, padding, *pool) != (3, 1, 1, *CCT_POOL):
        return (
            f"it needs kernel 3, stride 1, padding 1 and {CCT_POOL}; "
            f"got {kernel}, {stride}, {padding}, {pool}"
        )
    if CIN > 3 or C % 8 != 0 or x.shape[3] > CUDA_WIDTH:
        return (
            f"it needs images of 1 to 3 channels and at most {CUDA_WIDTH} columns and a multiple "
            f"of 8 filters; got x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        return "it computes no gradient of the images"
    return cuda_check(x, (torch.bfloat16, torch.float16))


CHECKS = {
    "reference": always,
    "triton": lambda x, *_: triton_check(x, DTYPES),
    "cuda": _cuda_check,
    "cpp": _cpp_check,
}
# by device, fastest first; Triton's interpreter is for tests that name it
ORDER = {"cuda": ("cuda", "triton"), "cpu": ("cpp",)}


torch.library.define(
    "lsmha_fast::conv_stem",
    "(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, int[] pool, "
    "bool need_codes, str backend) -> (Tensor out, Tensor codes)",
)
torch.library.define(
    "lsmha_fast::conv_stem_backward",
    "(Tensor do, Tensor x, Tensor weight, Tensor codes, int stride, int padding, int[] pool, "
    "bool need_dx, bool need_dweight, str backend) -> (Tensor dx, Tensor dweight, Tensor dbias)",
)


@impl("lsmha_fast::conv_stem", native=True)
def _forward_impl(x, weight, bias, stride, padding, pool, need_codes, backend):
    run = load_backend(__package__, backend).conv_stem
    return run(x, weight, bias, stride, padding, pool, need_codes)


@impl("lsmha_fast::conv_stem_backward")
def _backward_impl(do, x, weight, codes, stride, padding, pool, need_dx, need_dweight, backend):
    run = load_backend(__package__, backend).conv_stem_backward
    return run(do, x, weight, codes, stride, padding, pool, need_dx, need_dweight)


@torch.library.register_fake("lsmha_fast::conv_stem")
def _forward_fake(x, weight, bias, stride, padding, pool, need_codes, backend):
    sizes = (window_count(n, weight.shape[-1], stride, padding) for n in x.shape[2:])
    rows, cols = (window_count(n, *pool) for n in sizes)
    shape = (x.shape[0], rows * cols, weight.shape[0])
    codes = x.new_empty(shape if need_codes else (0,), dtype=torch.uint8)
    return x.new_empty(shape), codes


@torch.library.register_fake("lsmha_fast::conv_stem_backward")
def _backward_fake(do, x, weight, codes, stride, padding, pool, need_dx, need_dweight, backend):
    B, C, H, W = x.shape
    dx = x.new_empty(B, H, W, C).permute(0, 3, 1, 2) if need_dx else x.new_empty(0)
    if not need_dweight:
        return dx, x.new_empty(0), x.new_empty(0)
    return dx, weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


OPS = torch.ops.lsmha_fast


class _ConvStem(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, pool, backend):
        out, codes = call(OPS.conv_stem, x, weight, bias, stride, padding, pool, True, backend)
        ctx.save_for_backward(x, weight, codes)
        ctx.geometry = (stride, padding, pool)
        ctx.backend = backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        need_dx, *need_parameters = ctx.needs_input_grad[:3]
        need_dweight = any(need_parameters)
        grads = OPS.conv_stem_backward.default(
            do, *ctx.saved_tensors, *ctx.geometry, need_dx, need_dweight, ctx.backend
        )
        wanted = (g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None, None


def conv_stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int,
    padding: int,
    pool: Pool | tuple[int, int, int] | None = CCT_POOL,
    backend: str | None = None,
) -> Tensor:
    """Convolution, ReLU, max pooling and the layout of tokens: one layer of CCT's tokenizer.

    Equals `max_pool2d(relu(conv2d(x, weight, bias, stride, padding)), *pool)` followed by
    `.flatten(2).transpose(1, 2)` (arXiv 2104.05704, section 3.2). The gradient of a window goes
    to the first of its largest sums, as in PyTorch, on every backend; sums are compared before
    the bias, which cannot change their order. Tokens viewed as a channels-last image,
    `out.unflatten(1, (h, w)).permute(0, 3, 1, 2)`, feed a next layer without a copy.

    Args:
        x: images, (B, Cin, H, W), any strides.
        weight: filters, (C, Cin, k, k), in the dtype of `x`.
        bias: (C,) in the dtype of `x`, or None.
        stride: step of the convolution in pixels.
        padding: border of zeros in pixels.
        pool: (kernel, stride, padding) of the pooling, kernel at most 15; None for no pooling.
        backend: "reference", "triton", "cuda" or "cpp"; by default the fastest one for
            `x.device` that supports the call.

    Returns:
        Tokens, (B, N, C), row by row, in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or sizes do not fit, or the backend does not exist.
        BackendError: the named backend cannot run this call.
    """
    if not isinstance(pool, Pool):
        pool = NO_POOL if pool is None else Pool(*pool)
    _check(x, weight, bias, stride, padding, pool)
    order = ORDER.get(x.device.type, ())
    backend = resolve_backend("conv_stem", backend, CHECKS, order, x, weight, stride, padding, pool)
    differentiable = (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if differentiable and torch.is_grad_enabled():
        return _ConvStem.apply(x, weight, bias, stride, padding, list(pool), backend)
    return call(OPS.conv_stem, x, weight, bias, stride, padding, list(pool), False, backend)[0]


def _check(x, weight, bias, stride, padding, pool):
    """Raise ValueError, with the values, unless the three PyTorch calls would work too."""
    shape, filters = x.shape, weight.shape
    square = len(filters) == 4 and filters[2] == filters[3]
    if len(shape) != 4 or not square or filters[1] != shape[1]:
        raise ValueError(
            "conv_stem: expected x (B, Cin, H, W) and weight (C, Cin, k, k), "
            f"got x {tuple(shape)}, weight {tuple(filters)}"
        )
    if bias is not None and bias.shape != filters[:1]:
        raise ValueError(f"conv_stem: expected bias ({filters[0]},), got {tuple(bias.shape)}")
    dtype = x.dtype
    others = weight.dtype, dtype if bias is None else bias.dtype
    if others != (dtype, dtype) or not dtype.is_floating_point:
        raise ValueError(
            "conv_stem: x, weight and bias must share one floating-point dtype, "
            f"got {[t.dtype for t in (x, weight, bias) if t is not None]}"
        )
    if stride < 1 or padding < 0:
        raise ValueError(f"conv_stem: expected stride >= 1, padding >= 0; got {stride}, {padding}")
    if not (1 <= pool.kernel <= 15 and pool.stride >= 1 and 0 <= pool.padding <= pool.kernel // 2):
        raise ValueError(
            f"conv_stem: expected a pool kernel of 1 to 15, stride >= 1 and padding of at most "
            f"half the kernel, got {pool}"
        )
    # one window of the pooling along the shorter side, of windows of the convolution
    sums = window_count(min(shape[2:]), filters[2], stride, padding)
    if sums < 1 or window_count(sums, *pool) < 1:
        raise ValueError(
            f"conv_stem: the image is smaller than one window: x {tuple(shape)}, "
            f"weight {tuple(filters)}, stride {stride}, padding {padding}, {pool}"
        )
