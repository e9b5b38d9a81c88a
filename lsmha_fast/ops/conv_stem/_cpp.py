"""Gradients of the conv stem by the native CPU kernels, for images of few channels.

The forward pass is native from the dispatcher on: `conv_stem.cpp` in csrc/cpu.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Gradients of images (channels-last), weight and bias; those not needed are empty."""
    ops = torch.ops.lsmha_fast_C
    arguments = do.contiguous(), x, codes, weight.shape[-1], stride, padding, *pool
    dx, dweight, dbias = (x.new_empty(0) for _ in range(3))
    if need_dx:
        dy = ops.conv_stem_dy.default(*arguments)
        dx = _image_gradient(dy.permute(0, 3, 1, 2), x, weight, stride, padding)
    if need_dweight:
        dweight, dbias = ops.conv_stem_dweight.default(*arguments)
    return dx, dweight, dbias


def _image_gradient(dy, x, weight, stride, padding):
    """dx (B, Cin, H, W), channels-last: the transposed convolution of dy, by PyTorch."""
    sizes = zip(x.shape[2:], dy.shape[2:], strict=True)
    # pixels that the last window does not reach
    left_over = [n - (m - 1) * stride - weight.shape[-1] + 2 * padding for n, m in sizes]
    filters = weight.float().to(memory_format=torch.channels_last)
    dx = torch.conv_transpose2d(dy, filters, None, stride, padding, left_over)
    return dx.to(x.dtype).contiguous(memory_format=torch.channels_last)
