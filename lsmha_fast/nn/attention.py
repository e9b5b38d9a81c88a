"""LSMultiHeadAttention: `nn.MultiheadAttention` for very many heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import attention, attention_packed, attention_weights
from ._masks import AttentionMask, merge_masks


def _always_call_forward(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing: `nn.TransformerEncoderLayer`'s inference fast path reads the
    attention's weights and skips its `forward`, unless a hook is registered."""


class LSMultiHeadAttention(nn.MultiheadAttention):
    """Multi-head attention for very many small heads (arXiv 2506.23832).

    Arguments, call and state_dict are those of `torch.nn.MultiheadAttention`; any
    `num_heads` and `head_dim` works and no H x L x S tensor is held in memory. One difference is
    deliberate: a query whose keys are all masked gets zero attention instead of NaN.

    Args:
        embed_dim: channels of a query token and of the output.
        num_heads: heads H.
        dropout: dropout of the attention weights while training.
        bias: bias of the input projections and of the output projection.
        add_bias_kv: append a learned key and value.
        add_zero_attn: append a key and value of zeros.
        kdim, vdim: channels of keys and values, `embed_dim` by default.
        batch_first: (B, N, C) instead of (N, B, C).
        head_dim: channels D of a head; by default `embed_dim // num_heads`. With it, the heads
            have a width of their own, H * D, and `embed_dim` need not be divisible.
        qkv_bias: bias of the input projections alone; by default as `bias`. CCT has False here.
        backend: see `lsmha_fast.ops.attention`.

    Raises:
        ValueError: sizes that do not fit, with the values and what is allowed.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        head_dim: int | None = None,
        qkv_bias: bool | None = None,
        backend: str | None = None,
    ):
        # the parent's constructor cannot make a free head_dim; its attributes are set here
        nn.Module.__init__(self)
        _check_sizes(embed_dim, num_heads, head_dim, dropout)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self._qkv_same_embed_dim = self.kdim == embed_dim and self.vdim == embed_dim
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        self.backend = backend

        made = {"device": device, "dtype": dtype}
        inner = num_heads * self.head_dim
        packed, split = (None, made) if not self._qkv_same_embed_dim else (made, None)
        for name, rows, columns, where in (
            ("in_proj_weight", 3 * inner, embed_dim, packed),
            ("q_proj_weight", inner, embed_dim, split),
            ("k_proj_weight", inner, self.kdim, split),
            ("v_proj_weight", inner, self.vdim, split),
        ):
            weight = None if where is None else nn.Parameter(torch.empty(rows, columns, **where))
            self.register_parameter(name, weight)
        has_bias = bias if qkv_bias is None else qkv_bias
        in_bias = nn.Parameter(torch.empty(3 * inner, **made)) if has_bias else None
        self.register_parameter("in_proj_bias", in_bias)
        self.out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(
            inner, embed_dim, bias=bias, **made
        )
        for name in ("bias_k", "bias_v"):
            row = nn.Parameter(torch.empty(1, 1, inner, **made)) if add_bias_kv else None
            self.register_parameter(name, row)
        self._reset_parameters()
        self.register_forward_pre_hook(_always_call_forward)

    def _reset_parameters(self):
        """The parent's initialisation, which expects both biases or none."""
        weights = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        for weight in weights:
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for row in (self.bias_k, self.bias_v):
            if row is not None:
                nn.init.xavier_normal_(row)

    def heads(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        head_scale: Tensor | None = None,
    ) -> Tensor:
        """Outputs of the heads before the output projection, for self-attention.

        Args:
            x: tokens, (B, N, embed_dim), whatever `batch_first` says.
            key_mask: (B, N) bool, True where a token takes part as a key.
            attn_bias: added to the scaled scores, broadcastable to (B, H, N, N).
            head_scale: (H,) factor of each head's output.

        Returns:
            (B, N, H, D), contiguous.
        """
        if not self._qkv_same_embed_dim:
            raise ValueError(
                f"heads(x) is self-attention; this module has kdim={self.kdim}, vdim={self.vdim} "
                f"and embed_dim={self.embed_dim}"
            )
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return attention_packed(
            qkv.unflatten(-1, (3, self.num_heads, self.head_dim)),
            key_mask=key_mask,
            bias=attn_bias,
            dropout_p=self.dropout if self.training else 0.0,
            head_scale=head_scale,
            backend=self.backend,
        )

    def project(self, heads: Tensor) -> Tensor:
        """Output projection of the heads' outputs, (B, N, H, D) -> (B, N, embed_dim)."""
        return self.out_proj(heads.flatten(-2))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`, with its shapes, masks and errors.

        The returned weights are those before dropout.
        """
        batched = query.ndim == 3
        _check_inputs(self, query, key, value)
        if not batched:
            query, key, value = (t[None] for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        mask = merge_masks(
            query, key.shape[1], self.num_heads, key_padding_mask, attn_mask, is_causal
        )
        plain = self.bias_k is None and not self.add_zero_attn
        if plain and not need_weights and query is key is value and self._qkv_same_embed_dim:
            out, weights = self.heads(query, key_mask=mask.key_mask, attn_bias=mask.bias), None
        else:
            out, weights = self._general(
                query, key, value, mask, need_weights, average_attn_weights
            )
        out = self.project(out)  # (B, L, embed_dim)
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _general(self, query, key, value, mask: AttentionMask, need_weights, average):
        """Heads' outputs (B, L, H, D) and weights for separate queries, keys and values."""
        q, k, v = self._project_inputs(query, key, value)
        if self.bias_k is not None:
            k, v, mask = _append_key(k, v, self.bias_k, self.bias_v, mask)
        if self.add_zero_attn:
            zero = k.new_zeros(1, 1, k.shape[2] * k.shape[3])
            k, v, mask = _append_key(k, v, zero, zero, mask)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, ., D)
        out = attention(
            q,
            k,
            v,
            key_mask=mask.key_mask,
            bias=mask.bias,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        weights = None
        if need_weights and average:
            weights = attention_weights(q, k, key_mask=mask.key_mask, bias=mask.bias)
        elif need_weights:
            weights = _weights_per_head(q, k, mask)
        return out.transpose(1, 2), weights

    def _project_inputs(self, query, key, value):
        """(B, L, H, D), (B, S, H, D), (B, S, H, D)."""
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        sizes = (self.num_heads, self.head_dim)
        return (
            F.linear(x, w, b).unflatten(-1, sizes)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )


def _append_key(k, v, k_row, v_row, mask: AttentionMask):
    """Append one key and value, (1, 1, H * D) each, that no mask hides."""
    B, _, H, D = k.shape
    k, v = (
        torch.cat([t, row.to(t.dtype).unflatten(-1, (H, D)).expand(B, 1, H, D)], dim=1)
        for t, row in ((k, k_row), (v, v_row))
    )
    key_mask = None if mask.key_mask is None else F.pad(mask.key_mask, (0, 1), value=True)
    bias = None if mask.bias is None else F.pad(mask.bias, (0, 1))
    return k, v, AttentionMask(key_mask, bias)


def _weights_per_head(q, k, mask: AttentionMask) -> Tensor:
    """Softmax weights of every head, (B, H, L, S): the caller asked for that tensor."""
    rows = []
    for h in range(q.shape[1]):
        one = slice(h, h + 1)
        bias = mask.bias
        if bias is not None and bias.shape[1] > 1:
            bias = bias[:, one]
        rows.append(attention_weights(q[:, one], k[:, one], key_mask=mask.key_mask, bias=bias))
    return torch.stack(rows, dim=1)


def _check_sizes(embed_dim: int, num_heads: int, head_dim: int | None, dropout: float) -> None:
    if embed_dim <= 0 or num_heads <= 0 or (head_dim is not None and head_dim <= 0):
        raise ValueError(
            "embed_dim, num_heads and head_dim must be greater than 0, "
            f"got {embed_dim}, {num_heads} and {head_dim}"
        )
    if head_dim is None and embed_dim % num_heads:
        allowed = ", ".join(str(h) for h in range(1, embed_dim + 1) if embed_dim % h == 0)
        raise ValueError(
            f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}; choose num_heads "
            f"from {allowed}, or give head_dim to let the heads have a width of their own"
        )
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")


def _check_inputs(module: LSMultiHeadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.ndim not in (2, 3) or key.ndim != query.ndim or value.ndim != query.ndim:
        raise RuntimeError(
            "query, key and value must all be 2-D (unbatched) or all 3-D (batched), "
            f"got {query.ndim}-D, {key.ndim}-D and {value.ndim}-D"
        )
    given = tuple(t.shape[-1] for t in (query, key, value))
    wanted = (module.embed_dim, module.kdim, module.vdim)
    if given != wanted:
        raise RuntimeError(f"expected query, key, value with {wanted} channels, got {given}")
    if key.shape[:-1] != value.shape[:-1]:
        raise RuntimeError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in tokens or batch"
        )
