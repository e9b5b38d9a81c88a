"""The conv stem by the native CUDA kernels: the first layer of a 3 x 3 tokenizer."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import window_count

# partial sums of the weight's gradient; the number does not depend on the GPU, nor do the results
SHARES = 264
COLUMNS = 32


def conv_stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    pool: list[int],
    need_codes: bool,
) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, C) and, where needed, the codes (B, N, C) that the gradient follows."""
    rows, cols = (
        window_count(window_count(n, weight.shape[-1], stride, padding), *pool) for n in x.shape[2:]
    )
    out = x.new_empty(len(x), rows * cols, len(weight))
    codes = x.new_empty(out.shape if need_codes else (0,), dtype=torch.uint8)
    if out.numel() > 0:
        weight, bias = _dense(weight), None if bias is None else _dense(bias)
        written = codes if need_codes else None
        torch.ops.lsmha_fast_C_cuda.conv_stem(x, weight, bias, out, written)
    return out, codes


def conv_stem_backward(
    do: Tensor,
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    stride: int,
    padding: int,
    pool: list[int],
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight and bias, by partial sums and then torch.sum; those not needed are empty.

    The check refuses images that need a gradient.
    """
    if need_dx:
        raise NotImplementedError("conv_stem: backend 'cuda' computes no gradient of the images")
    none = x.new_empty(0)
    if not need_dweight:
        return none, none.clone(), none.clone()
    C, CIN = weight.shape[:2]
    if do.numel() == 0:
        return none, weight.new_zeros(weight.shape), weight.new_zeros(C)
    sums = x.new_empty(min(len(x), SHARES), C, COLUMNS, dtype=torch.float32)
    torch.ops.lsmha_fast_C_cuda.conv_stem_dweight(_dense(do), x, codes, sums)
    total = sums.sum(0).to(weight.dtype)
    dweight = total[:, : 9 * CIN].reshape(weight.shape)
    return none, dweight.contiguous(), total[:, 9 * CIN].contiguous()


def _dense(t: Tensor) -> Tensor:
    """Contiguous, at an address that the kernels' vectors fit."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()
