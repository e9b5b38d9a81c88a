"""Residual, stochastic depth and LayerNorm by the native CPU kernels, float32 and bfloat16.

Rows go through the first-level cache one at a time; sums of the parameters' gradients are those of
64 rows each, added in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import has_own_stream, stream_dtype


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
    y = x.new_empty(x.shape, dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    stream = None
    if has_own_stream(x, branch, post_norm, dtype):
        stream = x.new_empty(x.shape, dtype=stream_dtype(x, branch))
    torch.ops.lsmha_fast_C.residual_norm.default(
        x.contiguous(), _dense(branch), _floats(keep), _floats(weight), _floats(bias), eps,
        post_norm, stream, y, mean, rstd,
    )  # fmt: skip
    if stream is None:
        stream = x.new_empty(0, dtype=stream_dtype(x, branch))
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
    dx = x.new_empty(x.shape, dtype=dtype)
    dbranch = None if branch_dtype is None else x.new_empty(x.shape, dtype=branch_dtype)
    dweight, dbias = (mean.new_empty(x.shape[-1]) if need_parameters else None for _ in range(2))
    torch.ops.lsmha_fast_C.residual_norm_backward.default(
        dy.contiguous(), _dense(dstream), x.contiguous(), _dense(branch), _floats(keep),
        _floats(weight), mean, rstd, post_norm, dx, dbranch, dweight, dbias,
    )  # fmt: skip
    dbranch, dweight, dbias = (
        mean.new_empty(0) if t is None else t for t in (dbranch, dweight, dbias)
    )
    return dx, dbranch, dweight, dbias


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()
