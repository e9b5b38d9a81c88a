"""What stands around attention in an encoder, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm without affine part, product, bias: (M, C) -> (M, OUT)."""
    return F.linear(F.layer_norm(x, x.shape[-1:], eps=eps), weight, bias)


def project_mlp(
    heads: Tensor,
    x: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    normed_stream: bool,
    eps: float,
) -> Tensor:
    """Projection, residual, LayerNorm, MLP, residual: (M, IN) and (M, C) -> (M, C)."""
    stream = x + F.linear(heads, proj_weight, proj_bias)
    normal = F.layer_norm(stream, x.shape[-1:], norm_weight, norm_bias, eps)
    hidden = F.gelu(F.linear(normal, fc1_weight, fc1_bias))
    return (normal if normed_stream else stream) + F.linear(hidden, fc2_weight, fc2_bias)


def norm_pool_linear(
    x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm, sequence pooling, product, bias: (B, N, C) -> (B, K) in fp32 or wider."""
    acc = torch.promote_types(x.dtype, torch.float32)
    normal = F.layer_norm(x, x.shape[-1:], eps=eps)
    p = torch.softmax(normal.to(acc) @ scores.to(acc), 1)  # (B, N)
    pooled = torch.einsum("bn,bnc->bc", p, normal.to(acc)).to(x.dtype)
    return F.linear(pooled, weight, bias).to(acc)
