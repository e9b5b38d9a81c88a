"""Adapter for timm's attention with rotary position embeddings (EVA and others)."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from .adapter import Adapter, attend, sdpa_bias
from .windows import biased_qkv


class RotaryAttention(Adapter):
    """`EvaAttention` and `AttentionRope` of timm, with one projection or three."""

    PACKAGE = "timm"
    CLASSES = frozenset({"EvaAttention", "AttentionRope"})
    PARTS = frozenset(
        {"qkv", "q_proj", "k_proj", "v_proj", "q_bias", "v_bias", "q_norm", "k_norm"}
        | {"attn_drop", "norm", "gate", "proj", "proj_drop"}
    )

    @classmethod
    def refuses(cls, module) -> str | None:
        if getattr(module, "num_kv_groups", 1) != 1:
            return f"{module.num_kv_groups} heads share keys and values (grouped queries)"
        return None

    @classmethod
    def example(cls, module) -> tuple:
        return 2, 7, (module.q_proj if module.qkv is None else module.qkv).in_features

    @classmethod
    def sizes(cls, module) -> tuple[int, int]:
        layer = module.q_proj if module.qkv is None else module.qkv
        width = layer.out_features // (1 if module.qkv is None else 3)
        return module.num_heads, width // module.num_heads

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ):
        """(B, N, C) -> (B, N, C)."""
        q, k, v = self._projected(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._rotated(t, rope).type_as(v) for t in (q, k))
        out = self.norm(attend(self, q, k, v, sdpa_bias(attn_mask, is_causal, x, x.shape[1])))
        gate = getattr(self, "gate", None)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _projected(self, x: Tensor) -> list[Tensor]:
        """(B, H, N, D) each."""
        if self.qkv is not None:
            qkv = biased_qkv(self, x).unflatten(-1, (3, self.num_heads, -1))
            return [t.transpose(1, 2) for t in qkv.unbind(2)]
        layers: tuple[nn.Linear, ...] = (self.q_proj, self.k_proj, self.v_proj)
        return [layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in layers]

    def _rotated(self, t: Tensor, rope: Tensor) -> Tensor:
        """The tokens behind the prefix, turned by timm's own function."""
        prefix = t[:, :, : self.num_prefix_tokens]
        half = {"half": True} if getattr(self, "rotate_half", False) else {}
        # the module that defines the original class has imported it
        turn = importlib.import_module(type(self).__bases__[1].__module__).apply_rot_embed_cat
        return torch.cat([prefix, turn(t[:, :, self.num_prefix_tokens :], rope, **half)], dim=2)
