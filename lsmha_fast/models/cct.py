"""CCT: images -> stem -> blocks -> norm -> pool -> logits, in one screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn import ConvBlock, ConvStem, EncoderBlock, SeqPool
from .budget import equal_conv_hidden


class CCTOutput(NamedTuple):
    """Logits (B, K), and per transformer block its heads' outputs (B, N, H, D)."""

    logits: Tensor
    heads: tuple[Tensor, ...]


class CCT(nn.Module):
    """Compact convolutional transformer with any number of heads per block.

    Sources: arXiv 2104.05704 and SHI-Labs/Compact-Transformers `src/cct.py` for the network,
    arXiv 2506.23832 for many heads and for convolutions in place of the first blocks.

    Args:
        img_size: rows and columns of the images.
        num_classes: labels K.
        dim: channels C of a token.
        depth: blocks, of both kinds together.
        num_heads: heads H of every transformer block, or one number per transformer block.
        head_dim: channels D of a head, one number or one per transformer block; by default
            `dim // num_heads`.
        conv_blocks: how many of the first blocks are `ConvBlock`s.
        conv_form: their form: "full", "separable" or "bottleneck", see `nn.ConvBlock`.
        conv_hidden: channels between their convolutions; "params" or "macs" chooses the number
            at which such a block costs as much as the transformer block that it replaces.
        conv_residual: give those a residual connection.
        mlp_ratio: hidden channels of the MLP over `dim`.
        mlp_hidden: hidden channels themselves, one number or one per transformer block, instead.
        kernel_size, num_conv_layers: of the stem.
        in_channels: channels of the images.
        positional_embedding: "learnable", "sine" (fixed) or "none".
        attn_drop, dropout: dropout of attention weights; of embedding, projection and MLP.
        drop_path: stochastic depth, rising linearly from 0 in the first block to this value.
        pre_norm: standard pre-norm blocks instead of the published form.
        backend: of every op, see `lsmha_fast.ops`.
    """

    def __init__(
        self,
        *,
        img_size: int = 32,
        num_classes: int = 100,
        dim: int = 256,
        depth: int = 7,
        num_heads: int | Sequence[int] = 4,
        head_dim: int | Sequence[int] | None = None,
        conv_blocks: int = 0,
        conv_form: str = "full",
        conv_hidden: int | str | None = None,
        conv_residual: bool = False,
        mlp_ratio: float = 2.0,
        mlp_hidden: int | Sequence[int] | None = None,
        kernel_size: int = 3,
        num_conv_layers: int = 1,
        in_channels: int = 3,
        positional_embedding: str = "learnable",
        attn_drop: float = 0.1,
        dropout: float = 0.0,
        drop_path: float = 0.1,
        pre_norm: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        self.positional_emb: Tensor | None
        if depth < 1 or not 0 <= conv_blocks <= depth:
            raise ValueError(f"conv_blocks must be in 0..{depth} (the depth), got {conv_blocks}")
        heads, head_dims, hidden = (
            per_block(name, value, depth - conv_blocks)
            for name, value in (
                ("num_heads", num_heads),
                ("head_dim", head_dim),
                ("mlp_hidden", mlp_hidden),
            )
        )
        self.num_classes = num_classes
        self.img_size = img_size
        self.stem = ConvStem(
            dim,
            in_channels=in_channels,
            num_layers=num_conv_layers,
            kernel_size=kernel_size,
            backend=backend,
        )
        self.grid = self.stem.grid(img_size, img_size)
        num_tokens = self.grid[0] * self.grid[1]
        self._make_positional_embedding(positional_embedding, num_tokens, dim)
        self.dropout = nn.Dropout(dropout)
        if isinstance(conv_hidden, str):
            # the blocks that are gone would have had the heads of the first one that is left
            attn_dim = heads[0] * head_dims[0] if heads and head_dims[0] else dim
            conv_hidden = equal_conv_hidden(
                conv_hidden, conv_form, dim, num_tokens, attn_dim=attn_dim, mlp_ratio=mlp_ratio
            )
        rates = torch.linspace(0, drop_path, depth).tolist()
        convolutions = [
            ConvBlock(
                dim,
                form=conv_form,
                hidden=conv_hidden,
                grid=self.grid,
                residual=conv_residual,
                drop_path=rate if conv_residual else 0.0,
            )
            for rate in rates[:conv_blocks]
        ]
        encoders = [
            EncoderBlock(
                dim,
                h,
                head_dim=d,
                mlp_ratio=mlp_ratio,
                mlp_hidden=f,
                attn_drop=attn_drop,
                dropout=dropout,
                drop_path=rate,
                pre_norm=pre_norm,
                backend=backend,
            )
            for h, d, f, rate in zip(heads, head_dims, hidden, rates[conv_blocks:], strict=True)
        ]
        self.blocks = nn.ModuleList([*convolutions, *encoders])
        self.norm = nn.LayerNorm(dim)
        self.pool = SeqPool(dim, backend=backend)
        self.fc = nn.Linear(dim, num_classes)
        self.apply(_init_weights)

    def _make_positional_embedding(self, kind: str, num_tokens: int, dim: int) -> None:
        if kind == "learnable":
            self.positional_emb = nn.Parameter(torch.empty(1, num_tokens, dim))
            nn.init.trunc_normal_(self.positional_emb, std=0.2)
        elif kind == "sine":
            self.register_buffer("positional_emb", sinusoidal_embedding(num_tokens, dim))
        elif kind == "none":
            self.positional_emb = None
        else:
            raise ValueError(f"positional_embedding must be learnable, sine or none, got {kind!r}")

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the transformer blocks; numbers count the convolution blocks too."""
        return tuple(
            f"block {i}"
            for i, block in enumerate(self.blocks, start=1)
            if isinstance(block, EncoderBlock)
        )

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> tokens (B, N, C) with their positional embedding."""
        if images.ndim != 4 or images.shape[2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"CCT: expected images (B, {self.stem.convs[0].in_channels}, {self.img_size}, "
                f"{self.img_size}), got {tuple(images.shape)}"
            )
        x = self.stem(images)
        if self.positional_emb is not None:
            x = x + self.positional_emb
        return self.dropout(x)

    def classify(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) after the last block -> logits (B, K)."""
        return self.fc(self.pool(self.norm(x)))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, K)."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)

    def forward_with_heads(self, images: Tensor) -> CCTOutput:
        """The same pass, with the outputs of all heads of all transformer blocks."""
        x, heads = self.embed(images), []
        for block in self.blocks:
            if isinstance(block, EncoderBlock):
                x, z = block.forward_with_heads(x)
                heads.append(z)
            else:
                x = block(x)
        return CCTOutput(self.classify(x), tuple(heads))


def sinusoidal_embedding(num_tokens: int, dim: int) -> Tensor:
    """The fixed embedding of the published sine models, (1, num_tokens, dim)."""
    position = torch.arange(num_tokens, dtype=torch.float64)[:, None]
    channel = torch.arange(dim, dtype=torch.float64)
    angle = position / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


def per_block(name: str, value: Any, count: int) -> list[Any]:
    """One value for each of `count` transformer blocks, from one value or a sequence of them.

    Raises:
        ValueError: a sequence of another length.
    """
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ValueError(
            f"{name} must be one number, or {count} numbers, one per transformer block; "
            f"got {len(values)} numbers: {values}"
        )
    return values


def _init_weights(module: nn.Module) -> None:
    """Published initialisation; convolutions and embeddings are made with theirs."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.trunc_normal_(module.in_proj_weight, std=0.02)
