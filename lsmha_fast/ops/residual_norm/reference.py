"""Residual, stochastic depth and LayerNorm: the definition and its gradient written out."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import accumulator, has_own_stream, stream_dtype


def definition(
    x: Tensor,
    branch: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    post_norm: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stream and y (B, ..., C); mean and reciprocal deviation (B, ..., 1) of every row, unrounded.

    In standard operators, which autograd and compilers see through.
    """
    acc = accumulator(x, branch)
    total = _sum(x, branch, keep, acc)
    stream = x
    if branch is not None and not post_norm:
        stream = total.to(stream_dtype(x, branch))
        total = stream.to(acc)  # y is the norm of the stream as it is returned
    scale, shift = (None if t is None else t.to(acc) for t in (weight, bias))
    y, mean, rstd = torch.native_layer_norm(total, x.shape[-1:], scale, shift, eps)
    low = y.to(dtype)
    if post_norm:
        stream = y.to(stream_dtype(x, branch)) if has_own_stream(x, branch, True, dtype) else low
    return stream, low, mean, rstd


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
    """As `definition`, with mean and deviation (B, ...); a stream that is `x` or y comes empty."""
    stream, y, mean, rstd = definition(x, branch, keep, weight, bias, eps, post_norm, dtype)
    if not has_own_stream(x, branch, post_norm, dtype):
        stream = x.new_empty(0, dtype=stream_dtype(x, branch))
    return stream, y, mean.squeeze(-1), rstd.squeeze(-1)


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
    """The gradient written out, so that gradcheck proves the formula the kernels implement.

    With s = x + k branch, n = (s - mean) rstd and y = n w + b: let g be dy, and with `post_norm`
    dy + dstream. Then dw = sum g n and db = sum g over all rows, h = g w, and in every row
    ds = rstd (h - mean(h) - n mean(h n)), plus dstream without `post_norm`; dx = ds and
    dbranch = k ds. Where s was kept it comes as `x`, without a branch; else it is added up again,
    which reads what writing and reading s would move.
    """
    acc = mean.dtype
    n = (_sum(x, branch, keep, acc) - mean[..., None]) * rstd[..., None]
    g = dy.to(acc)
    if post_norm and dstream is not None:
        g = g + dstream.to(acc)
    h = g if weight is None else g * weight.to(acc)
    ds = h - h.mean(-1, keepdim=True) - n * (h * n).mean(-1, keepdim=True)
    ds = ds * rstd[..., None]
    if not post_norm and dstream is not None:
        ds = ds + dstream.to(acc)
    dbranch, dweight, dbias = (mean.new_empty(0) for _ in range(3))
    if branch_dtype is not None:
        dbranch = (ds if keep is None else ds * _per_sample(keep, ds)).to(branch_dtype, copy=True)
    if need_parameters:
        rows = tuple(range(x.ndim - 1))
        dweight, dbias = (g * n).sum(rows), g.sum(rows)
    return ds.to(dtype), dbranch, dweight, dbias


def _sum(x: Tensor, branch: Tensor | None, keep: Tensor | None, acc: torch.dtype) -> Tensor:
    """x + keep * branch in the accumulator's dtype, dense."""
    if branch is None:
        return x.to(acc).contiguous()
    branch = branch.to(acc)
    return (
        x.to(acc) + (branch if keep is None else branch * _per_sample(keep, branch))
    ).contiguous()


def _per_sample(keep: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) in the dtype of `like`."""
    return keep.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
