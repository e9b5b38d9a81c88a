"""Adapters for timm's attention with a small key dim and wider values: LeViT and its kin."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .adapter import Adapter, attend


class _KeyDim(Adapter):
    """What the family shares: `key_dim`, `val_dim` and a bias per offset of positions."""

    @classmethod
    def sizes(cls, module) -> tuple[int, int]:
        return module.num_heads, module.key_dim

    def _split(self, x: Tensor, *widths: int) -> list[Tensor]:
        """(B, N, H sum(widths)) -> (B, H, N, width) each."""
        x = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return list(x.split(widths, dim=-1))

    def _split_image(self, x: Tensor, *widths: int) -> list[Tensor]:
        """(B, H sum(widths), rows, columns) -> (B, H, N, width) each."""
        x = x.flatten(2).unflatten(1, (self.num_heads, -1))
        return [t.mT for t in x.split(widths, dim=2)]


class LevitAttention(_KeyDim):
    """`Attention` of `timm.models.levit`, over tokens or over an image."""

    PACKAGE = "timm.models.levit"
    CLASSES = frozenset({"Attention"})
    PARTS = frozenset({"qkv", "proj", "attention_biases"})

    @classmethod
    def example(cls, module) -> tuple:
        return _levit_example(module, next(module.qkv.parameters()).shape[1])

    def forward(self, x: Tensor):
        """(B, N, C) -> (B, N, C), or (B, C, rows, columns) -> the same."""
        widths = self.key_dim, self.key_dim, self.val_dim
        bias = self.get_attention_biases(x.device)
        split = self._split_image if self.use_conv else self._split
        q, k, v = split(self.qkv(x), *widths)
        out = attend(self, q, k, v, bias)
        return self.proj(out.mT.unflatten(-1, x.shape[2:]) if self.use_conv else out)


class LevitDownsample(_KeyDim):
    """`AttentionDownsample` of `timm.models.levit`: fewer queries than keys."""

    PACKAGE = "timm.models.levit"
    CLASSES = frozenset({"AttentionDownsample"})
    PARTS = frozenset({"q", "kv", "proj", "attention_biases"})

    @classmethod
    def example(cls, module) -> tuple:
        return _levit_example(module, next(module.kv.parameters()).shape[1])

    def forward(self, x: Tensor):
        """(B, N, C) -> (B, fewer, C), or (B, C, rows, columns) -> a smaller image."""
        widths = self.key_dim, self.val_dim
        bias = self.get_attention_biases(x.device)
        if not self.use_conv:
            k, v = self._split(self.kv(x), *widths)
            (q,) = self._split(self.q(x), self.key_dim)
            return self.proj(attend(self, q, k, v, bias))
        k, v = self._split_image(self.kv(x), *widths)
        image = self.q(x)
        (q,) = self._split_image(image, self.key_dim)
        return self.proj(attend(self, q, k, v, bias).mT.unflatten(-1, image.shape[2:]))


class TinyViTAttention(_KeyDim):
    """`Attention` of `timm.models.tiny_vit`."""

    PACKAGE = "timm.models.tiny_vit"
    CLASSES = frozenset({"Attention"})
    PARTS = frozenset({"norm", "qkv", "proj", "attention_biases"})

    @classmethod
    def example(cls, module) -> tuple:
        return 2, math.prod(module.resolution), module.qkv.in_features

    def forward(self, x: Tensor):
        """(B, N, C) -> (B, N, C)."""
        q, k, v = self._split(self.qkv(self.norm(x)), self.key_dim, self.key_dim, self.val_dim)
        return self.proj(attend(self, q, k, v, self.get_attention_biases(x.device)))


class CascadedAttention(_KeyDim):
    """`CascadedGroupAttention` of `timm.models.efficientvit_msra`: heads one after another, each
    fed with the output of the one before."""

    PACKAGE = "timm.models.efficientvit_msra"
    CLASSES = frozenset({"CascadedGroupAttention"})
    PARTS = frozenset({"qkvs", "dws", "proj", "attention_biases"})

    @classmethod
    def example(cls, module) -> tuple:
        channels = next(module.qkvs[0].parameters()).shape[1] * module.num_heads
        return 2, channels, module.resolution, module.resolution

    def forward(self, x: Tensor):
        """(B, C, rows, columns) -> the same."""
        bias = self.get_attention_biases(x.device)
        outs: list[Tensor] = []
        for h, (part, qkv, conv) in enumerate(
            zip(x.chunk(len(self.qkvs), dim=1), self.qkvs, self.dws, strict=True)
        ):
            part = part + outs[-1] if outs else part
            q, k, v = qkv(part).split((self.key_dim, self.key_dim, self.val_dim), dim=1)
            q, k, v = (t.flatten(2).mT[:, None] for t in (conv(q), k, v))  # (B, 1, N, .)
            out = attend(self, q, k, v, bias[h])
            outs.append(out.mT.unflatten(-1, x.shape[2:]))
        return self.proj(torch.cat(outs, 1))


def _levit_example(module, channels: int) -> tuple:
    if module.use_conv:
        return 2, channels, *module.resolution
    return 2, math.prod(module.resolution), channels
