"""Residual, stochastic depth and LayerNorm in Triton: a program holds whole rows in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_utils import next_pow2
from .common import has_own_stream, stream_dtype

# numbers at a time, 8 per thread
TILE = 2048
# sums of the parameters' gradients that run in parallel, at most
PARTS = 1024


@triton.jit
def _sum_tile(x_ptr, branch_ptr, keep, offset, mask):
    """x + keep * branch in fp32."""
    s = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        s += tl.load(branch_ptr + offset, mask=mask, other=0.0).to(tl.float32) * keep[:, None]
    return s


@triton.jit
def _residual_norm_fwd(
    x_ptr,
    branch_ptr,
    keep_ptr,
    weight_ptr,
    bias_ptr,
    stream_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    C,
    rows_per_sample,
    eps,
    POST_NORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    valid = first + r < num_rows
    mask = valid[:, None] & (c < C)[None, :]  # [BLOCK_R, BLOCK_C]
    offset = first * C + r[:, None] * C + c[None, :]
    keep = tl.full([BLOCK_R], 1.0, tl.float32)
    if keep_ptr is not None:
        keep = tl.load(keep_ptr + (first + r) // rows_per_sample, mask=valid, other=0.0)
    s = _sum_tile(x_ptr, branch_ptr, keep, offset, mask)
    if stream_ptr is not None and not POST_NORM:
        # y is the norm of the stream as it is returned
        s = s.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + offset, s, mask=mask)
        s = s.to(tl.float32)
    mean = tl.sum(s, axis=1) / C
    d = tl.where(mask, s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d, axis=1) / C + eps)
    y = d * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offset, y, mask=mask)
    if stream_ptr is not None and POST_NORM:
        tl.store(stream_ptr + offset, y, mask=mask)
    tl.store(mean_ptr + first + r, mean, mask=valid)
    tl.store(rstd_ptr + first + r, rstd, mask=valid)


@triton.jit
def _residual_norm_bwd(
    dy_ptr,
    dstream_ptr,
    x_ptr,
    branch_ptr,
    keep_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dbranch_ptr,
    dweight_ptr,
    dbias_ptr,
    num_rows,
    C,
    rows_per_sample,
    rows_per_program,
    POST_NORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    columns = c < C
    weight = tl.full([BLOCK_C], 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=columns, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows_per_program, BLOCK_R):
        first = program * rows_per_program + start
        valid = first + r < num_rows
        mask = valid[:, None] & columns[None, :]
        offset = first * C + r[:, None] * C + c[None, :]
        keep = tl.full([BLOCK_R], 1.0, tl.float32)
        if keep_ptr is not None:
            keep = tl.load(keep_ptr + (first + r) // rows_per_sample, mask=valid, other=0.0)
        mean = tl.load(mean_ptr + first + r, mask=valid, other=0.0)
        rstd = tl.load(rstd_ptr + first + r, mask=valid, other=0.0)
        # n: the normalised row; g: the gradient of y, zero where nothing is
        n = (_sum_tile(x_ptr, branch_ptr, keep, offset, mask) - mean[:, None]) * rstd[:, None]
        g = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if POST_NORM and dstream_ptr is not None:
            g += tl.load(dstream_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if dweight_ptr is not None:
            dweight += g * n
            dbias += g
        # rounded here and once: fused into h - mean(h), equal numbers would not cancel
        h = tl.where(mask, g * weight[None, :], 0.0)
        mean_h = tl.sum(h, axis=1) / C
        mean_hn = tl.sum(h * n, axis=1) / C
        ds = (h - mean_h[:, None] - n * mean_hn[:, None]) * rstd[:, None]
        if not POST_NORM and dstream_ptr is not None:
            ds += tl.load(dstream_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offset, ds, mask=mask)
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + offset, ds * keep[:, None], mask=mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * C + c, tl.sum(dweight, axis=0), mask=columns)
        tl.store(dbias_ptr + program * C + c, tl.sum(dbias, axis=0), mask=columns)


def blocks(C: int) -> tuple[dict[str, int], int]:
    """Tile for rows of C channels, and the number of warps that hold it."""
    BLOCK_C = next_pow2(C)
    BLOCK_R = max(1, TILE // BLOCK_C)
    return {"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C}, min(16, BLOCK_R * BLOCK_C // 256)


def rows_per_program(num_rows: int, BLOCK_R: int) -> int:
    """Rows of one partial sum: by the number of rows alone, so that every GPU has the same bits."""
    return max(BLOCK_R, next_pow2(triton.cdiv(num_rows, PARTS)))


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    post_norm: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stream, empty where it is `x` or y, and y (B, ..., C); mean and 1 / deviation in fp32."""
    C = x.shape[-1]
    y = x.new_empty(x.shape, dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    own = has_own_stream(x, branch, post_norm, dtype)
    stream = x.new_empty(x.shape if own else (0,), dtype=stream_dtype(x, branch))
    if num_rows := mean.numel():
        tile, num_warps = blocks(C)
        _residual_norm_fwd[(triton.cdiv(num_rows, tile["BLOCK_R"]),)](
            x.contiguous(), _dense(branch), _floats(keep), _dense(weight), _dense(bias),
            stream if own else None, y, mean, rstd, num_rows, C, num_rows // len(x), eps,
            POST_NORM=post_norm, **tile, num_warps=num_warps,
        )  # fmt: skip
    return stream, y, mean, rstd


def residual_norm_backward(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    post_norm: bool,
    dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, weight and bias; those not asked for are empty."""
    C, num_rows = x.shape[-1], mean.numel()
    dx = x.new_empty(x.shape, dtype=dtype)
    dbranch = None if branch_dtype is None else x.new_empty(x.shape, dtype=branch_dtype)
    tile, num_warps = blocks(C)
    rows = rows_per_program(num_rows, tile["BLOCK_R"])
    programs = triton.cdiv(num_rows, rows)
    partial = mean.new_empty(2, programs, C) if need_parameters else None
    dweight, dbias = (None, None) if partial is None else partial
    if num_rows:
        _residual_norm_bwd[(programs,)](
            dy.contiguous(), _dense(dstream), x.contiguous(), _dense(branch), _floats(keep),
            _dense(weight), mean, rstd, dx, dbranch, dweight, dbias, num_rows, C,
            num_rows // len(x), rows, POST_NORM=post_norm, **tile, num_warps=num_warps,
        )  # fmt: skip
    empty = mean.new_empty(0)
    sums = (empty, empty.clone()) if partial is None else partial.sum(1).unbind()
    return dx, mean.new_empty(0) if dbranch is None else dbranch, *sums


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


# what the kernels are compiled for ahead of time: channels of CCT, of larger models, the widest
AOT_CHANNELS = (256, 384, 4096)
# dtypes of x, branch and y: all alike, and fp32 tokens around 16-bit products
AOT_DTYPES = (("fp32", "fp32", "fp32"), ("bf16", "bf16", "bf16"), ("fp32", "bf16", "bf16"))


def aot_configs():
    """Every kernel of this file for shapes of real models, for `tests/aot.py`."""
    small = {"keep_ptr": "*fp32:16", "weight_ptr": "*fp32:16"}
    rows = {"mean_ptr": "*fp32:16", "rstd_ptr": "*fp32:16"}
    sizes = {"num_rows": "i32:16", "C": "i32:16", "rows_per_sample": "i32:16"}
    for C in AOT_CHANNELS:
        tile, num_warps = blocks(C)
        for dtypes in AOT_DTYPES:
            x, branch, y = (f"*{dtype}:16" for dtype in dtypes)
            inputs = {"x_ptr": x, "branch_ptr": branch, **small, **rows, **sizes}
            forward = {**inputs, "bias_ptr": "*fp32:16", "stream_ptr": x, "y_ptr": y, "eps": "fp32"}
            backward = {
                **inputs,
                **{"dy_ptr": y, "dstream_ptr": x, "dx_ptr": x, "dbranch_ptr": branch},
                **{
                    "dweight_ptr": "*fp32:16",
                    "dbias_ptr": "*fp32:16",
                    "rows_per_program": "i32:16",
                },
            }
            for post_norm in (False, True):
                constants = {"POST_NORM": post_norm, **tile}
                yield _residual_norm_fwd, forward, constants, num_warps, 1
                yield _residual_norm_bwd, backward, constants, num_warps, 1
