"""Sequence pooling: the definition in plain PyTorch and its gradient written out."""

from __future__ import annotations

import torch
from torch import Tensor


def seq_pool(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pool (B, N, H, D) tokens to (B, H, D) per head; also return the softmax weights (B, N, H)."""
    acc = torch.promote_types(x.dtype, torch.float32)
    score = torch.einsum("bnhd,hd->bnh", x.to(acc), weight.to(acc))
    p = torch.softmax(score, dim=1)  # (B, N, H)
    return torch.einsum("bnh,bnhd->bhd", p, x.to(acc)).to(x.dtype), p


def seq_pool_backward(do: Tensor, x: Tensor, weight: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient written out, so that gradcheck proves the formula the kernels implement.

    With s = x.w, p = softmax(s) and o = sum_n p x:
    dp_n = do.x_n, ds = p (dp - sum_n p dp), dx_n = p_n do + ds_n w, dw = sum_bn ds_n x_n.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    x_f, do_f = x.to(acc), do.to(acc)
    dp = torch.einsum("bhd,bnhd->bnh", do_f, x_f)
    ds = p * (dp - (p * dp).sum(1, keepdim=True))  # (B, N, H)
    dx = p[..., None] * do_f[:, None] + ds[..., None] * weight.to(acc)
    dweight = torch.einsum("bnh,bnhd->hd", ds, x_f)
    return dx.to(x.dtype), dweight.to(weight.dtype)
