"""Sequence pooling by the native CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def seq_pool(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled vectors (B, H, D) and logsumexp (B, H) in fp32."""
    return torch.ops.lsmha_fast_C.seq_pool(_readable(x), weight.float().contiguous())


def seq_pool_backward(
    do: Tensor, x: Tensor, weight: Tensor, pooled: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens and of the weight; the latter is summed over images by torch."""
    dx, partial = torch.ops.lsmha_fast_C.seq_pool_backward(
        do.float().contiguous(), _readable(x), weight.float().contiguous(), pooled, lse
    )
    return dx, partial.sum(0).to(weight.dtype)


def _readable(x: Tensor) -> Tensor:
    # the kernels take any strides but need dense channels
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
