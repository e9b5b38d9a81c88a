"""The masks of `nn.MultiheadAttention`, turned into those of `ops.attention`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionMask(NamedTuple):
    """`key_mask` (B, S) bool, True takes part; `bias` added to scores, (B or 1, H or 1, L, S)."""

    key_mask: Tensor | None
    bias: Tensor | None


def merge_masks(
    query: Tensor,
    num_keys: int,
    num_heads: int,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> AttentionMask:
    """Bring masks to the form the op takes.

    Args:
        query: (B, L, C).
        num_keys: S.
        num_heads: H.
        key_padding_mask: (B, S) or (S,); bool, True is ignored, or float, added.
        attn_mask: (L, S) or (B * H, L, S); bool, True is ignored, or float, added.
        is_causal: a hint that `attn_mask` is causal, as in torch; it is then not needed twice.

    Raises:
        RuntimeError: wrong shapes, or `is_causal` without a mask.
    """
    B, L = query.shape[:2]
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "is_causal=True is a hint about attn_mask: pass the causal mask too, for example "
            "torch.nn.Transformer.generate_square_subsequent_mask(L)"
        )
    bias = None if attn_mask is None else _attn_bias(attn_mask, query, num_keys, num_heads)
    if key_padding_mask is None:
        return AttentionMask(None, bias)
    if key_padding_mask.ndim == 1:
        key_padding_mask = key_padding_mask[None]
    if key_padding_mask.shape != (B, num_keys):
        raise RuntimeError(
            f"key_padding_mask must have shape {(B, num_keys)}, got {tuple(key_padding_mask.shape)}"
        )
    if key_padding_mask.dtype == torch.bool:
        return AttentionMask(~key_padding_mask, bias)
    padding = key_padding_mask.to(query.dtype)[:, None, None, :]
    return AttentionMask(None, padding if bias is None else bias + padding)


def _attn_bias(attn_mask: Tensor, query: Tensor, num_keys: int, num_heads: int) -> Tensor:
    """(L, S) or (B * H, L, S), bool or float, to an additive float bias of four dimensions."""
    B, L = query.shape[:2]
    if attn_mask.shape == (L, num_keys):
        mask = attn_mask[None, None]
    elif attn_mask.shape == (B * num_heads, L, num_keys):
        mask = attn_mask.unflatten(0, (B, num_heads))
    else:
        raise RuntimeError(
            f"attn_mask must have shape {(L, num_keys)} or {(B * num_heads, L, num_keys)}, "
            f"got {tuple(attn_mask.shape)}"
        )
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    return query.new_zeros(mask.shape).masked_fill_(mask, float("-inf"))
