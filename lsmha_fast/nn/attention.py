"""LSMultiHeadAttention: `nn.MultiheadAttention` for very many heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import attention, attention_packed, attention_with_weights
from ._call_forms import call_layout, check_sizes, forward_nested
from ._fast_path import NoFastPath, forbid_fast_path
from ._masks import AttentionMask, merge_masks
from .linear import Linear, linear


class OutProjection(Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
    """`Linear` of the type that `nn.MultiheadAttention` has there."""


class LSMultiHeadAttention(NoFastPath, nn.MultiheadAttention):
    """Multi-head attention for very many small heads (arXiv 2506.23832).

    Arguments, call and state_dict are those of `torch.nn.MultiheadAttention`; any
    `num_heads` and `head_dim` works and no H x L x S tensor is held in memory. One difference is
    deliberate: a query whose keys are all masked gets zero attention, and zero weights, instead of
    NaN, in training and evaluation alike. `nn.TransformerEncoderLayer` calls this module in
    evaluation, too, where it would skip its own.

    Args:
        embed_dim: channels of a query token and of the output.
        num_heads: heads H.
        dropout: dropout of the attention weights while training.
        bias: bias of the input projections and of the output projection.
        add_bias_kv: append a learned key and value.
        add_zero_attn: append a key and value of zeros.
        kdim, vdim: channels of keys and values, `embed_dim` by default.
        batch_first: (B, N, C) instead of (N, B, C).
        device, dtype: of the parameters.
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
        check_sizes(embed_dim, num_heads, head_dim, dropout)
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
        self.out_proj = OutProjection(inner, embed_dim, bias=bias, **made)
        for name in ("bias_k", "bias_v"):
            row = nn.Parameter(torch.empty(1, 1, inner, **made)) if add_bias_kv else None
            self.register_parameter(name, row)
        self._reset_parameters()
        forbid_fast_path(self)

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

    @classmethod
    def adopt(cls, module: nn.MultiheadAttention, backend: str | None = None) -> None:
        """Turn an `nn.MultiheadAttention` into this class, in place.

        Parameters, state_dict keys and hooks stay, so optimizers made before go on to work.

        Args:
            module: an `nn.MultiheadAttention`, not a subclass.
            backend: see `lsmha_fast.ops.attention`.
        """
        module.__class__ = cls
        module.backend = backend  # type: ignore[assignment]
        forbid_fast_path(module)

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

        Raises:
            ValueError: keys or values have other channels than queries.
        """
        if not self._qkv_same_embed_dim:
            raise ValueError(
                f"heads(x) is self-attention; this module has kdim={self.kdim}, vdim={self.vdim} "
                f"and embed_dim={self.embed_dim}"
            )
        mask = AttentionMask(key_mask, attn_bias)
        return self._attend_packed(self._project_packed(x), mask, head_scale)

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
        """As `torch.nn.MultiheadAttention.forward`, with its shapes, masks and error types.

        `need_weights=True` returns the average over the heads without an H x L x S tensor in
        memory; as there, the weights are those that were used: while training, after dropout.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return forward_nested(
                self,
                query,
                key,
                value,
                key_padding_mask,
                attn_mask,
                need_weights=need_weights,
                average_attn_weights=average_attn_weights,
            )
        layout = call_layout(self, query, key, value, key_padding_mask, attn_mask)
        B, L = layout.to_batch_first(query).shape[:2]
        sizes = B, self.num_heads, L, layout.to_batch_first(key).shape[1]
        mask = merge_masks(query, sizes, key_padding_mask, attn_mask, is_causal, need_weights)
        more_keys = self.bias_k is not None or self.add_zero_attn
        packed = self._qkv_same_embed_dim and query is key and key is value
        if packed and not need_weights and not more_keys:
            qkv = layout.to_batch_first(self._project_packed(query))
            out, weights = self._attend_packed(qkv, mask), None
        else:
            q, k, v = (layout.to_batch_first(t) for t in self._project_inputs(query, key, value))
            if more_keys:
                k, v, mask = self._append_keys(k, v, mask)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, ., D)
            if not need_weights:
                out, weights = self._attend(q, k, v, mask), None
            elif average_attn_weights:
                out, weights = self._attend_with_weights(q, k, v, mask)
            else:
                out, weights = self._attend_with_head_weights(q, k, v, mask)
            out = out.transpose(1, 2)
        out = layout.from_batch_first(self.project(out))
        if weights is not None and not layout.batched:
            weights = weights[0]
        return out, weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """(B, H, ., D) -> (B, H, L, D)."""
        return attention(
            q,
            k,
            v,
            key_mask=mask.key_mask,
            bias=mask.bias,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )

    def _attend_with_weights(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask):
        """(B, H, ., D) -> (B, H, L, D) and weights averaged over the heads (B, L, S)."""
        return attention_with_weights(
            q,
            k,
            v,
            key_mask=mask.key_mask,
            bias=mask.bias,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )

    def _attend_with_head_weights(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask):
        """(B, H, ., D) -> (B, H, L, D) and weights (B, H, L, S): each head as an image of its own,
        which has the same dropout."""
        B, H = q.shape[:2]
        q, k, v = (t.flatten(0, 1)[:, None] for t in (q, k, v))
        out, weights = self._attend_with_weights(q, k, v, mask.of_heads(B, H))
        return out.unflatten(0, (B, H)).squeeze(2), weights.unflatten(0, (B, H))

    def _attend_packed(
        self, qkv: Tensor, mask: AttentionMask, head_scale: Tensor | None = None
    ) -> Tensor:
        """(B, N, 3, H, D) -> (B, N, H, D)."""
        return attention_packed(
            qkv,
            key_mask=mask.key_mask,
            bias=mask.bias,
            dropout_p=self.dropout if self.training else 0.0,
            head_scale=head_scale,
            backend=self.backend,
        )

    def _project_packed(self, x: Tensor) -> Tensor:
        """(..., embed_dim) -> (..., 3, H, D)."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        qkv = linear(x, weight, None if bias is None else bias.to(weight.dtype))
        return qkv.view(*qkv.shape[:-1], 3, self.num_heads, self.head_dim)

    def _project_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q (..., H, D), k and v (..., H, D), with as few products as the inputs allow."""
        if self._qkv_same_embed_dim and query is key and key is value:
            return self._project_packed(query).unbind(-3)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        sizes = (self.num_heads, self.head_dim)
        return tuple(
            linear(x, w, b).unflatten(-1, sizes)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )

    def _append_keys(self, k: Tensor, v: Tensor, mask: AttentionMask):
        """Append the learned key and value, then those of zeros, to (B, S, H, D)."""
        rows: list[tuple[Tensor, Tensor]] = []
        if self.bias_k is not None and self.bias_v is not None:
            rows.append((self.bias_k, self.bias_v))
        if self.add_zero_attn:
            zero = k.new_zeros(1, 1, k.shape[2] * k.shape[3])
            rows.append((zero, zero))
        for pair in rows:
            k, v = (
                torch.cat(
                    [t, row.to(t.dtype).view(1, 1, *t.shape[2:]).expand(len(t), -1, -1, -1)], 1
                )
                for t, row in zip((k, v), pair, strict=True)
            )
            mask = mask.with_free_key()
        return k, v, mask
