"""Adapters for plain attention over tokens: timm, published CCT, vit-pytorch."""

from __future__ import annotations

from torch import Tensor, nn

from .adapter import Adapter, attend, attend_packed, sdpa_bias


class PackedAttention(Adapter):
    """`Attention` with `qkv` and `proj`: timm's (ViT, DeiT, PiT, ...), and that of published CCT
    (SHI-Labs/Compact-Transformers `src/utils/transformers.py`), which descends from it."""

    CLASSES = frozenset({"Attention"})
    PARTS = frozenset({"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"})

    @classmethod
    def has_parts(cls, module) -> bool:
        linear = (getattr(module, name, None) for name in ("qkv", "proj"))
        heads = getattr(module, "num_heads", None)
        return all(isinstance(layer, nn.Linear) for layer in linear) and isinstance(heads, int)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False):
        """(B, N, C) -> (B, N, C)."""
        bias = sdpa_bias(attn_mask, is_causal, x, x.shape[1])
        gate = getattr(self, "gate", None)
        out = _self_attention(self, self.qkv(x), bias)
        if isinstance(getattr(self, "norm", None), nn.Module):
            out = self.norm(out)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class CCTAttention(Adapter):
    """vit-pytorch's copy of the published CCT attention, which calls the heads `heads`."""

    CLASSES = frozenset({"Attention"})
    PARTS = frozenset({"qkv", "proj"})

    @classmethod
    def has_parts(cls, module) -> bool:
        linear = (getattr(module, name, None) for name in ("qkv", "proj"))
        return all(isinstance(layer, nn.Linear) for layer in linear) and hasattr(module, "heads")

    @classmethod
    def sizes(cls, module) -> tuple[int, int]:
        return module.heads, module.qkv.out_features // (3 * module.heads)

    @property
    def num_heads(self) -> int:
        return self.heads

    def forward(self, x: Tensor):
        """(B, N, C) -> (B, N, C)."""
        return self.proj_drop(self.proj(attend_packed(self, self.qkv(x))))


class ViTPytorchAttention(Adapter):
    """`Attention` with `to_qkv` and `to_out` of vit-pytorch (vit, simple_vit and what is alike)."""

    CLASSES = frozenset({"Attention"})
    PARTS = frozenset({"norm", "to_qkv", "attend", "dropout", "to_out"})

    @classmethod
    def has_parts(cls, module) -> bool:
        return (
            isinstance(getattr(module, "to_qkv", None), nn.Linear)
            and isinstance(getattr(module, "attend", None), nn.Softmax)
            and hasattr(module, "heads")
        )

    @classmethod
    def example(cls, module) -> tuple:
        return 2, 7, module.to_qkv.in_features

    @classmethod
    def sizes(cls, module) -> tuple[int, int]:
        return module.heads, module.to_qkv.out_features // (3 * module.heads)

    @property
    def num_heads(self) -> int:
        return self.heads

    @property
    def attn_drop(self):
        return getattr(self, "dropout", None)

    def forward(self, x: Tensor):
        """(B, N, C) -> (B, N, C)."""
        if isinstance(getattr(self, "norm", None), nn.Module):
            x = self.norm(x)
        return self.to_out(attend_packed(self, self.to_qkv(x)))


class RelPosAttention(Adapter):
    """timm's attention with a relative position bias, its own or its model's."""

    PACKAGE = "timm"
    CLASSES = frozenset({"RelPosAttention"})
    PARTS = frozenset({"qkv", "q_norm", "k_norm", "rel_pos", "attn_drop", "proj", "proj_drop"})

    @classmethod
    def refuses(cls, module) -> str | None:
        if module.rel_pos is not None and not hasattr(module.rel_pos, "get_bias"):
            return f"its rel_pos, {type(module.rel_pos).__name__}, has no get_bias()"
        return None

    @classmethod
    def example(cls, module) -> tuple:
        tokens = 7 if module.rel_pos is None else module.rel_pos.get_bias().shape[-1]
        return 2, tokens, module.qkv.in_features

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None):
        """(B, N, C) -> (B, N, C)."""
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        return self.proj_drop(self.proj(_self_attention(self, self.qkv(x), bias)))


class ClassAttention(Adapter):
    """timm's `ClassAttn` of CaiT: the first token asks all tokens."""

    PACKAGE = "timm"
    CLASSES = frozenset({"ClassAttn"})
    PARTS = frozenset({"q", "k", "v", "attn_drop", "proj", "proj_drop"})

    @classmethod
    def example(cls, module) -> tuple:
        return 2, 7, module.q.in_features

    @classmethod
    def sizes(cls, module) -> tuple[int, int]:
        return module.num_heads, module.q.out_features // module.num_heads

    def forward(self, x: Tensor):
        """(B, N, C) -> (B, 1, C)."""
        q, k, v = (
            layer(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.q, x[:, :1]), (self.k, x), (self.v, x))
        )
        return self.proj_drop(self.proj(attend(self, q, k, v)))


def _self_attention(module, qkv: Tensor, bias: Tensor | None) -> Tensor:
    """(B, N, 3 H D) -> (B, N, H D), with the norms of queries and keys where the module has any."""
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if all(norm is None or isinstance(norm, nn.Identity) for norm in norms):
        return attend_packed(module, qkv, bias)
    q, k, v = (t.transpose(1, 2) for t in qkv.unflatten(-1, (3, module.num_heads, -1)).unbind(2))
    q, k = (t if norm is None else norm(t) for t, norm in zip((q, k), norms, strict=True))
    return attend(module, q, k, v, bias)
