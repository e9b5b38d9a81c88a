"""Adapters for timm's attention with a table of relative position biases: BEiT, Swin, Swin v2."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .adapter import Adapter, attend, attend_packed


class BeitAttention(Adapter):
    """`Attention` of `timm.models.beit`: biases of q and v, bias table by window offset."""

    PACKAGE = "timm.models.beit"
    CLASSES = frozenset({"Attention"})
    PARTS = frozenset(
        {"qkv", "q_bias", "v_bias", "relative_position_bias_table", "attn_drop", "proj"}
        | {"proj_drop"}
    )

    @classmethod
    def example(cls, module) -> tuple:
        tokens = 7 if module.window_size is None else math.prod(module.window_size) + 1
        return 2, tokens, module.qkv.in_features

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None):
        """(B, N, C) -> (B, N, C)."""
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return self.proj_drop(self.proj(attend_packed(self, biased_qkv(self, x), bias)))


class SwinAttention(Adapter):
    """`WindowAttention` of `timm.models.swin_transformer`."""

    PACKAGE = "timm.models.swin_transformer"
    CLASSES = frozenset({"WindowAttention"})
    PARTS = frozenset(
        {"qkv", "relative_position_bias_table", "attn_drop", "proj", "proj_drop", "softmax"}
    )

    @classmethod
    def example(cls, module) -> tuple:
        return 2, math.prod(module.window_size), module.qkv.in_features

    def forward(self, x: Tensor, mask: Tensor | None = None):
        """Windows (B, N, C) -> (B, N, C); `mask` (windows of an image, N, N) is added."""
        bias = _add_window_mask(self._get_rel_pos_bias(), mask, len(x))
        return self.proj_drop(self.proj(attend_packed(self, self.qkv(x), bias)))


class SwinV2Attention(Adapter):
    """`WindowAttention` of `timm.models.swin_transformer_v2`: cosine scores, a scale per head."""

    PACKAGE = "timm.models.swin_transformer_v2"
    CLASSES = frozenset({"WindowAttention"})
    PARTS = frozenset(
        {"qkv", "q_bias", "v_bias", "logit_scale", "cpb_mlp", "attn_drop", "proj", "proj_drop"}
        | {"softmax"}
    )

    @classmethod
    def example(cls, module) -> tuple:
        return 2, math.prod(module.window_size), module.qkv.in_features

    @classmethod
    def sizes(cls, module) -> tuple[int, int]:
        return module.num_heads, module.qkv.out_features // (3 * module.num_heads)

    def forward(self, x: Tensor, mask: Tensor | None = None):
        """Windows (B, N, C) -> (B, N, C); `mask` (windows of an image, N, N) is added."""
        qkv = biased_qkv(self, x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
        bias = _add_window_mask(self._rel_pos_bias(), mask, len(x))
        return self.proj_drop(self.proj(attend(self, q, k, v, bias, scale=1.0)))

    def _rel_pos_bias(self) -> Tensor:
        """(1, H, N, N)."""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = table[self.relative_position_index]  # (N, N, H)
        return 16 * bias.permute(2, 0, 1)[None].sigmoid()


def biased_qkv(module, x: Tensor) -> Tensor:
    """(B, N, 3 H D): q and v have a bias each, k has none."""
    if getattr(module, "q_bias", None) is None:
        return module.qkv(x)
    bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    return F.linear(x, module.qkv.weight, bias)


def _add_window_mask(bias: Tensor, mask: Tensor | None, batch: int) -> Tensor:
    """(1, H, N, N) and, per window of an image, (W, N, N) -> (batch, H, N, N)."""
    if mask is None:
        return bias
    return (bias + mask[:, None]).repeat(batch // len(mask), 1, 1, 1)
