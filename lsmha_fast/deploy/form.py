"""The inference form of a CCT: the same function of the images with less arithmetic around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import CCT
from ..nn import ConvBlock, EncoderBlock
from ..nn.conv_stem import POOL
from ..ops import attention_packed, conv_stem, seq_pool
from . import fold, fused
from .layers import Convolution, Dense


class Stem(nn.Module):
    """Images to tokens; takes bytes where a normalisation was folded into the first convolution."""

    def __init__(self, model: CCT, dtype: torch.dtype, mean, std):
        super().__init__()
        stem = model.stem
        self.dtype = dtype
        self.stride, self.padding, self.backend = stem.stride, stem.padding, stem.backend
        self.bytes = mean is not None
        self.grids = []
        size = (model.img_size, model.img_size)
        for i, conv in enumerate(stem.convs):
            affine = fold.affine_of(conv)
            if i == 0 and self.bytes:
                affine = fold.input_into_stem(affine, mean, std)
            self.register_buffer(f"weight{i}", affine.weight.to(dtype))
            bias = None if affine.bias is None else affine.bias.to(dtype)
            self.register_buffer(f"bias{i}", bias)
            size = stem._layer_grid(*size)
            self.grids.append(size)
        embedding = model.positional_emb
        self.positional_emb: Tensor | None
        self.register_buffer(
            "positional_emb", None if embedding is None else embedding.detach().to(dtype)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, C)."""
        x = F.pad(images, (0, 0, 0, 0, 0, 1), value=1) if self.bytes else images
        x = x.to(self.dtype)
        for i, grid in enumerate(self.grids):
            tokens = conv_stem(
                x,
                getattr(self, f"weight{i}"),
                getattr(self, f"bias{i}"),
                stride=self.stride,
                padding=self.padding,
                pool=POOL,
                backend=self.backend,
            )
            x = tokens.transpose(1, 2).unflatten(2, grid)
        return tokens if self.positional_emb is None else tokens + self.positional_emb


class Encoder(nn.Module):
    """A transformer block: LayerNorm's affine parts and the softmax scale are in the weights."""

    def __init__(self, block: EncoderBlock, dtype: torch.dtype):
        super().__init__()
        attn = block.self_attn
        qkv, proj, self.num_heads = fold.without_silent_heads(attn)
        self.head_dim, self.backend = attn.head_dim, attn.backend
        self.standard_pre_norm = block.standard_pre_norm
        qkv = fold.scale_into_query(fold.norm_into_linear(block.pre_norm, qkv), self.head_dim)
        fc1 = fold.affine_of(block.linear1)
        self.pre_norm = plain_norm(block.pre_norm)
        if block.standard_pre_norm:
            fc1 = fold.norm_into_linear(block.norm1, fc1)
            self.norm1 = plain_norm(block.norm1)
        else:  # its output is the residual stream itself
            self.norm1 = affine_norm(block.norm1, dtype)
        self.qkv, self.proj = Dense(qkv, dtype), Dense(proj, dtype)
        self.fc1 = Dense(fc1, dtype, gelu=True)
        self.fc2 = Dense(fold.affine_of(block.linear2), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if fused.takes(x):
            return fused.encoder(self, x)
        qkv = self.qkv(self.pre_norm(x)).unflatten(-1, (3, self.num_heads, self.head_dim))
        heads = attention_packed(qkv, scale=1.0, backend=self.backend).flatten(-2)
        x = self.proj(heads, residual=x)
        if self.standard_pre_norm:
            return self.fc2(self.fc1(self.norm1(x)), residual=x)
        x = self.norm1(x)
        return self.fc2(self.fc1(x), residual=x)


class ConvLayers(nn.Sequential):
    """A convolution block: BatchNorm is in the weights; 1 x 1 convolutions are products."""

    def __init__(self, block: ConvBlock, grid: tuple[int, int], dtype: torch.dtype):
        super().__init__()
        self.residual = block.residual
        for conv, norm in zip(block.convs, block.norms, strict=True):
            weight, bias = fold.batch_norm_into_conv(conv, norm)
            if conv.kernel_size == (1, 1):
                self.append(Dense(fold.Affine(weight.flatten(1), bias), dtype, gelu=True))
            else:
                affine = fold.Affine(weight, bias)
                self.append(Convolution(affine, dtype, grid=grid, groups=conv.groups))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        out = super().forward(x)
        return x + out if self.residual else out


class Head(nn.Module):
    """Tokens to logits: the final LayerNorm's affine part is in pooling scores and classifier."""

    def __init__(self, model: CCT, dtype: torch.dtype):
        super().__init__()
        pool, fc = fold.norm_into_classifier(model.norm, model.pool, model.fc)
        self.norm, self.backend = plain_norm(model.norm), model.pool.backend
        self.scores: Tensor
        self.register_buffer("scores", pool.to(dtype))
        self.fc = Dense(fc, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, K)."""
        if fused.takes(x):
            return fused.head(self, x)
        pooled = seq_pool(self.norm(x)[:, :, None], self.scores, backend=self.backend)
        return self.fc(pooled[:, 0])


class InferenceCCT(nn.Module):
    """What `optimize` returns: images to logits, without gradients, training or dropout.

    Args:
        model: a trained CCT; it is not changed.
        dtype: of weights and tokens; logits are always float32.
        mean, std: of the normalisation to fold into the stem, per channel; then images are uint8.
    """

    def __init__(
        self,
        model: CCT,
        dtype: torch.dtype,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        self.dtype, self.grid, self.num_classes = dtype, model.grid, model.num_classes
        self.image_shape = (model.stem.convs[0].in_channels, model.img_size, model.img_size)
        self.image_dtype = torch.float32 if mean is None else torch.uint8
        self.stem = Stem(model, dtype, mean, std)
        self.blocks = nn.ModuleList(
            ConvLayers(block, model.grid, dtype)
            if isinstance(block, ConvBlock)
            else Encoder(cast(EncoderBlock, block), dtype)
            for block in model.blocks
        )
        self.head = Head(model, dtype)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), uint8 or float -> logits (B, K) float32."""
        if images.shape[1:] != self.image_shape or (images.dtype == torch.uint8) != (
            self.image_dtype == torch.uint8
        ):
            raise ValueError(
                f"expected images (B, {', '.join(map(str, self.image_shape))}) "
                f"{self.image_dtype}, got {tuple(images.shape)} {images.dtype}"
            )
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x).float()


def plain_norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    """The normalisation without its affine part."""
    return nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)


def affine_norm(norm: nn.LayerNorm, dtype: torch.dtype) -> nn.LayerNorm:
    """A copy that takes no gradient."""
    made = nn.LayerNorm(norm.normalized_shape, norm.eps, device=norm.weight.device, dtype=dtype)
    made.load_state_dict(norm.state_dict())
    return made.requires_grad_(False)
