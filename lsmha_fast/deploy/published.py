"""The published formulation of attention, to compare with: softmax of all heads in memory."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from ..models import CCT
from ..nn import EncoderBlock, LSMultiHeadAttention
from ..nn.linear import Linear


class PublishedAttention(nn.Module):
    """Attention as SHI-Labs/Compact-Transformers writes it, with the interface a block asks for.

    Args:
        like: whose weights are used; they are shared.
    """

    def __init__(self, like: LSMultiHeadAttention):
        super().__init__()
        self.num_heads, self.dropout = like.num_heads, like.dropout
        self.in_proj_weight, self.out_proj = like.in_proj_weight, like.out_proj

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, H, D), with a (B, H, N, N) tensor in between."""
        qkv = F.linear(x, self.in_proj_weight).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        weights = F.dropout(weights.softmax(-1), self.dropout, self.training)
        return (weights @ v).transpose(1, 2)

    def project(self, heads: Tensor) -> Tensor:
        """(B, N, H, D) -> (B, N, C)."""
        return self.out_proj(heads.flatten(-2))


def with_published_attention(model: CCT) -> CCT:
    """A copy of a model with the published attention and `nn.Linear`; nothing else differs."""
    made = copy.deepcopy(model)
    for block in made.blocks:
        if isinstance(block, EncoderBlock):
            attention = PublishedAttention(block.self_attn).train(model.training)
            block.self_attn = attention  # type: ignore[assignment]
    for module in made.modules():
        if isinstance(module, Linear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return made
