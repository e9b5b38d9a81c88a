"""Sequence pooling: the definition in plain PyTorch and its gradient written out."""

from __future__ import annotations

import torch
from torch import Tensor


def seq_pool(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pool (B, N, H, D) tokens to (B, H, D) per head; also the scores' logsumexp (B, H).

    Both come in fp32, or fp64 for fp64 tokens: the backward needs them unrounded.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    score = torch.einsum("bnhd,hd->bnh", x.to(acc), weight.to(acc))
    p = torch.softmax(score, dim=1)  # (B, N, H)
    pooled = torch.einsum("bnh,bnhd->bhd", p, x.to(acc))
    # dense, as the fake kernels promise; einsum chooses strides of its own
    return pooled.contiguous(), torch.logsumexp(score, dim=1).contiguous()


def seq_pool_backward(
    do: Tensor, x: Tensor, weight: Tensor, pooled: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient written out, so that gradcheck proves the formula the kernels implement.

    With s = x.w, p = exp(s - lse) and o = sum_n p_n x_n, the pooled vector:
    dp_n = do.x_n, delta = sum_n p_n dp_n = do.o, ds = p (dp - delta),
    dx_n = p_n do + ds_n w, dw = sum_bn ds_n x_n. Keeping o and lse instead of p makes what is
    saved N times smaller than one number per token and head.
    """
    x_f, do_f, w_f = (t.to(pooled.dtype) for t in (x, do, weight))
    p = torch.exp(torch.einsum("bnhd,hd->bnh", x_f, w_f) - lse[:, None])
    dp = torch.einsum("bhd,bnhd->bnh", do_f, x_f)
    delta = (do_f * pooled).sum(-1)  # (B, H)
    ds = p * (dp - delta[:, None])  # (B, N, H)
    dx = p[..., None] * do_f[:, None] + ds[..., None] * w_f
    dweight = torch.einsum("bnh,bnhd->hd", ds, x_f)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype).contiguous()
