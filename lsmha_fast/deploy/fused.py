"""The inference form on a GPU: a block is three or four launches, the head one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import attention_packed, norm_linear, norm_pool_linear, project_mlp

if TYPE_CHECKING:
    from .form import Encoder, Head


def takes(x: Tensor) -> bool:
    """Whether these tokens take the fused ops: on a GPU, where nobody asks for a gradient.

    An exported program holds standard operators alone.
    """
    gradient = torch.is_grad_enabled() and x.requires_grad
    return x.is_cuda and not gradient and not torch.compiler.is_exporting()


def encoder(block: Encoder, x: Tensor) -> Tensor:
    """(B, N, C) -> (B, N, C)."""
    qkv, proj, fc1, fc2 = (
        (d.weight, d.bias) for d in (block.qkv, block.proj, block.fc1, block.fc2)
    )
    norm = block.norm1
    packed = norm_linear(x, *qkv, eps=block.pre_norm.eps)
    packed = packed.unflatten(-1, (3, block.num_heads, block.head_dim))
    heads = attention_packed(packed, scale=1.0, backend=block.backend).flatten(-2)
    return project_mlp(
        heads, x, proj, (norm.weight, norm.bias), fc1, fc2,
        normed_stream=not block.standard_pre_norm, eps=norm.eps,
    )  # fmt: skip


def head(layers: Head, x: Tensor) -> Tensor:
    """(B, N, C) -> (B, K) float32."""
    fc = layers.fc
    return norm_pool_linear(x, layers.scores[0], fc.weight, fc.bias, eps=layers.norm.eps)
