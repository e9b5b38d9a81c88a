"""The call forms of `nn.MultiheadAttention`: checks, layouts, nested tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class InputError(AssertionError, ValueError):
    """Sizes or shapes that do not fit: a ValueError, and what nn.MultiheadAttention raises."""


def check_sizes(embed_dim: int, num_heads: int, head_dim: int | None, dropout: float) -> None:
    """Check the constructor's numbers.

    Raises:
        ValueError: with the values and what is allowed.
    """
    if embed_dim <= 0 or num_heads <= 0 or (head_dim is not None and head_dim <= 0):
        raise ValueError(
            "embed_dim, num_heads and head_dim must be greater than 0, "
            f"got {embed_dim}, {num_heads} and {head_dim}"
        )
    if head_dim is None and embed_dim % num_heads:
        allowed = ", ".join(str(h) for h in range(1, embed_dim + 1) if embed_dim % h == 0)
        raise InputError(
            f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}; choose num_heads "
            f"from {allowed}, or give head_dim to let the heads have a width of their own"
        )
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")


class Layout(NamedTuple):
    """Where batch and tokens are in the tensors of one call."""

    batched: bool
    batch_first: bool

    def to_batch_first(self, x: Tensor) -> Tensor:
        """(N, ...), (N, B, ...) or (B, N, ...) -> (B, N, ...), a view."""
        if not self.batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def from_batch_first(self, x: Tensor) -> Tensor:
        """The inverse."""
        if not self.batched:
            return x[0]
        return x if self.batch_first else x.transpose(0, 1)


def call_layout(module, query, key, value, key_padding_mask, attn_mask) -> Layout:
    """Check the shapes of one call as `nn.MultiheadAttention` does, and say its layout.

    Raises:
        AssertionError: numbers of dimensions, tokens or channels do not fit.
        RuntimeError: key or value have other channels than the packed projection takes.
    """
    layout = Layout(
        F._mha_shape_check(  # type: ignore[attr-defined]  # torch's own messages
            query, key, value, key_padding_mask, attn_mask, module.num_heads
        ),
        module.batch_first,
    )
    if query.shape[-1] != module.embed_dim:
        raise InputError(
            f"expected a query of {module.embed_dim} channels, got {tuple(query.shape)}"
        )
    if key.shape[:-1] != value.shape[:-1]:
        raise InputError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in tokens or batch"
        )
    channels = key.shape[-1], value.shape[-1]
    if channels != (module.kdim, module.vdim):
        packed = module._qkv_same_embed_dim and key.shape == value.shape
        raise (RuntimeError if packed else InputError)(
            f"expected key and value of {module.kdim} and {module.vdim} channels, "
            f"got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if layout.batched:
        batch_dim = 0 if layout.batch_first else 1
        if query.shape[batch_dim] != key.shape[batch_dim]:
            raise RuntimeError(
                f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch "
                f"(dimension {batch_dim})"
            )
    return layout


def forward_nested(module, query, key, value, key_padding_mask, attn_mask, **options):
    """`module.forward` for nested tensors (B, ragged N, C), computed on padded ones.

    `nn.TransformerEncoder` makes them from padded batches in evaluation.

    Returns:
        A nested tensor like `query`, and the padded weights or None.

    Raises:
        AssertionError: masks beside nested tensors, or nested tensors beside others.
    """
    if not (query.is_nested and key.is_nested and value.is_nested):
        raise InputError("query, key and value must all be nested tensors, or none of them")
    if key_padding_mask is not None or attn_mask is not None or not module.batch_first:
        raise InputError("nested tensors take batch_first=True and no masks")
    same = query is key and key is value
    q_lengths, k_lengths = _lengths(query), _lengths(key)
    padded_q = query.to_padded_tensor(0.0)
    padded_k = padded_q if same else key.to_padded_tensor(0.0)
    padded_v = padded_q if same else value.to_padded_tensor(0.0)
    padding = torch.arange(padded_k.shape[1], device=padded_k.device) >= k_lengths[:, None]
    out, weights = module.forward(padded_q, padded_k, padded_v, padding, **options)
    if query.layout == torch.jagged:
        taken = torch.arange(out.shape[1], device=out.device) < q_lengths[:, None]
        return torch.nested.nested_tensor_from_jagged(out[taken], query.offsets()), weights
    rows = [o[:n] for o, n in zip(out, q_lengths.tolist(), strict=True)]
    return torch.nested.as_nested_tensor(rows), weights


def _lengths(nested: Tensor) -> Tensor:
    """Tokens of each sample of a nested tensor, (B,)."""
    if nested.layout == torch.jagged:
        return nested.offsets().diff()  # type: ignore[attr-defined]
    return nested._nested_tensor_size()[:, 0].to(nested.device)
