"""The masks of `nn.MultiheadAttention`, turned into those of `ops.attention`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._call_forms import InputError


class AttentionMask(NamedTuple):
    """`key_mask` (B, S) bool, True takes part; `bias` added to scores, (B or 1, H or 1, L, S)."""

    key_mask: Tensor | None
    bias: Tensor | None

    def with_free_key(self) -> AttentionMask:
        """For one more key that no mask hides."""
        return AttentionMask(
            None if self.key_mask is None else F.pad(self.key_mask, (0, 1), value=True),
            None if self.bias is None else F.pad(self.bias, (0, 1)),
        )

    def of_heads(self, B: int, H: int) -> AttentionMask:
        """For heads that count as images: (B * H, S) and (B * H or 1, 1, L, S)."""
        key_mask, bias = self
        if key_mask is not None:
            key_mask = key_mask[:, None].expand(B, H, -1).flatten(0, 1)
        if bias is not None and bias.shape[:2] != (1, 1):
            bias = bias.expand(B, H, -1, -1).flatten(0, 1)[:, None]
        return AttentionMask(key_mask, bias)


def merge_masks(
    query: Tensor,
    sizes: tuple[int, int, int, int],
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    need_weights: bool,
) -> AttentionMask:
    """Bring masks to the form the op takes.

    Args:
        query: gives dtype and device.
        sizes: (B, H, L, S).
        key_padding_mask: (B, S) or (S,); bool, True is ignored, or float, added.
        attn_mask: (L, S) or (B * H, L, S); bool, True is ignored, or float, added.
        is_causal: a hint that `attn_mask` is causal. As in torch the hint decides, whatever the
            mask says, where there is no key_padding_mask and no weights are asked for.
        need_weights: see `is_causal`.

    Raises:
        AssertionError: a key_padding_mask of another shape, a mask that is neither bool nor float.
        RuntimeError: an attn_mask of another shape, or `is_causal` without a mask.
    """
    B, H, L, S = sizes
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise InputError(f"{name} must be bool or float, got {mask.dtype}")
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "is_causal=True is a hint about attn_mask: pass the causal mask too, for example "
            "torch.nn.Transformer.generate_square_subsequent_mask(L)"
        )
    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = torch.ones(L, S, dtype=torch.bool, device=query.device).triu_(1)
    bias = None if attn_mask is None else _attn_bias(attn_mask, query, sizes)
    if key_padding_mask is None:
        return AttentionMask(None, bias)
    if key_padding_mask.ndim == 1:
        key_padding_mask = key_padding_mask[None]
    if key_padding_mask.shape != (B, S):
        raise InputError(
            f"key_padding_mask must have shape {(B, S)}, got {tuple(key_padding_mask.shape)}"
        )
    if key_padding_mask.dtype == torch.bool:
        return AttentionMask(~key_padding_mask, bias)
    padding = key_padding_mask.to(query.dtype)[:, None, None, :]
    return AttentionMask(None, padding if bias is None else bias + padding)


def _attn_bias(attn_mask: Tensor, query: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """(L, S) or (B * H, L, S), bool or float, to an additive float bias of four dimensions."""
    B, H, L, S = sizes
    if attn_mask.shape == (L, S):
        mask = attn_mask[None, None]
    elif attn_mask.shape == (B * H, L, S):
        mask = attn_mask.unflatten(0, (B, H))
    else:
        raise RuntimeError(
            f"attn_mask must have shape {(L, S)} or {(B * H, L, S)}, got {tuple(attn_mask.shape)}"
        )
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    return query.new_zeros(mask.shape).masked_fill_(mask, float("-inf"))
