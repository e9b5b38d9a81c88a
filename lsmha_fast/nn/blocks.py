"""EncoderBlock and ConvBlock: tokens (B, N, C) -> tokens (B, N, C)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import residual_norm
from .attention import LSMultiHeadAttention
from .linear import Linear


class DropPath(nn.Module):
    """Stochastic depth per sample: drop the whole branch, scale what is kept by 1 / (1 - p).

    Args:
        p: probability of dropping a sample's branch, in [0, 1).
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"DropPath: p must be in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples of `x` (B, ...) while training."""
        keep = self.draw(x)
        return x if keep is None else x * keep.to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    def draw(self, x: Tensor) -> Tensor | None:
        """Factors of the samples of `x` (B, ...), (B,); None where all are kept as they are."""
        if not self.training or self.p == 0.0:
            return None
        keep = torch.rand(x.shape[0], device=x.device) >= self.p
        return keep.to(torch.promote_types(x.dtype, torch.float32)) / (1.0 - self.p)

    def extra_repr(self) -> str:
        """The probability, for `print`."""
        return f"p={self.p:.3f}"


def _add_and_norm(
    norm: nn.LayerNorm,
    x: Tensor,
    branch: Tensor | None = None,
    keep: Tensor | None = None,
    post_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """`residual_norm` by a LayerNorm; what is normalised has the dtype of autocast's products."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if cast else None
    return residual_norm(
        x, branch, norm.weight, norm.bias, keep=keep, eps=norm.eps, post_norm=post_norm, dtype=dtype
    )


class EncoderBlock(nn.Module):
    """Transformer block of CCT with large-scale multi-head attention.

    As published, the second LayerNorm acts on the residual stream itself:
    x <- x + attn(pre_norm(x)); x <- norm1(x); x <- x + mlp(x)
    (SHI-Labs/Compact-Transformers `src/utils/transformers.py`, discussed in its issue 25).
    `pre_norm=True` gives the standard form x <- x + mlp(norm1(x)).

    Args:
        dim: channels C of a token.
        num_heads: heads H.
        head_dim: channels of a head; `dim // num_heads` by default.
        mlp_ratio: hidden channels of the MLP over `dim`.
        mlp_hidden: hidden channels themselves; by default from `mlp_ratio`.
        attn_drop: dropout of the attention weights.
        dropout: dropout after the output projection and inside the MLP.
        drop_path: stochastic depth of both branches.
        pre_norm: standard pre-norm instead of the published form.
        backend: see `lsmha_fast.ops.attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        mlp_ratio: float = 2.0,
        mlp_hidden: int | None = None,
        attn_drop: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        pre_norm: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        hidden = int(dim * mlp_ratio) if mlp_hidden is None else mlp_hidden
        if hidden < 1:
            raise ValueError(f"the MLP needs at least 1 hidden channel, got {hidden}")
        self.pre_norm = nn.LayerNorm(dim)
        self.self_attn = LSMultiHeadAttention(
            dim,
            num_heads,
            attn_drop,
            head_dim=head_dim,
            qkv_bias=False,
            batch_first=True,
            backend=backend,
        )
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = Linear(dim, hidden)
        self.linear2 = Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)
        self.standard_pre_norm = pre_norm

    def mlp(self, x: Tensor) -> Tensor:
        """The feed-forward branch, (B, N, C) -> (B, N, C)."""
        return self.dropout(self.linear2(self.dropout(F.gelu(self.linear1(x)))))

    def forward_with_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) -> tokens (B, N, C) and the heads' outputs (B, N, H, D)."""
        x, normed = _add_and_norm(self.pre_norm, x)
        heads = self.self_attn.heads(normed)
        branch = self.dropout(self.self_attn.project(heads))
        keep, post_norm = self.drop_path.draw(branch), not self.standard_pre_norm
        x, normed = _add_and_norm(self.norm1, x, branch, keep, post_norm)
        return x + self.drop_path(self.mlp(normed)), heads

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> tokens (B, N, C)."""
        return self.forward_with_heads(x)[0]


CONV_FORMS = ("full", "separable", "bottleneck")


class ConvLayer(NamedTuple):
    """One convolution of a `ConvBlock`; groups is 1, or the channels where it is depthwise."""

    inputs: int
    outputs: int
    kernel_size: int
    groups: int = 1

    @property
    def weights(self) -> int:
        """Elements of the weight, which are also the multiply-adds per token."""
        return self.inputs // self.groups * self.outputs * self.kernel_size**2


def conv_layers(
    form: str, dim: int, hidden: int | None = None, kernel_size: int = 3
) -> tuple[ConvLayer, ...]:
    """The convolutions that make up a form of `ConvBlock`.

    | form | without `hidden` | with `hidden` h |
    |---|---|---|
    | full | k x k: C -> C | k x k: C -> h, k x k: h -> C |
    | separable | depthwise k x k, 1 x 1: C -> C | depthwise k x k, 1 x 1: C -> h, 1 x 1: h -> C |
    | bottleneck | h = C / 4 | 1 x 1: C -> h, k x k: h -> h, 1 x 1: h -> C |

    Raises:
        ValueError: an unknown form, or a width below 1.
    """
    if form not in CONV_FORMS:
        raise ValueError(f"conv_form must be one of {', '.join(CONV_FORMS)}, got {form!r}")
    if hidden is not None and hidden < 1:
        raise ValueError(f"conv_hidden must be at least 1, got {hidden}")
    k = kernel_size
    if form == "bottleneck":
        h = hidden or max(dim // 4, 1)
        return ConvLayer(dim, h, 1), ConvLayer(h, h, k), ConvLayer(h, dim, 1)
    spatial = form == "full"
    first = () if spatial else (ConvLayer(dim, dim, k, dim),)
    k = k if spatial else 1
    if hidden is None:
        return *first, ConvLayer(dim, dim, k)
    return *first, ConvLayer(dim, hidden, k), ConvLayer(hidden, dim, k)


class ConvBlock(nn.Module):
    """Convolutions that stand in for a transformer block, each with BatchNorm and GELU.

    Tokens (B, N, C) are a channels-last image of the token grid, so nothing is permuted in memory.
    The paper (arXiv 2506.23832) replaces the first blocks by convolutional layers; their exact
    form is not known to us, so there are three, and the residual connection is an option, off by
    default.

    Args:
        dim: channels C of a token.
        form: "full", "separable" (depthwise, then pointwise) or "bottleneck"; see `conv_layers`.
        hidden: channels between the convolutions; see `conv_layers`.
        grid: rows and columns of tokens; None means a square grid.
        kernel_size: odd, "same" padding.
        residual: add the input to the output.
        drop_path: stochastic depth of the branch; needs `residual`.
    """

    def __init__(
        self,
        dim: int,
        *,
        form: str = "full",
        hidden: int | None = None,
        grid: tuple[int, int] | None = None,
        kernel_size: int = 3,
        residual: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"ConvBlock: kernel_size must be odd, got {kernel_size}")
        if drop_path and not residual:
            raise ValueError(f"ConvBlock: drop_path={drop_path} needs residual=True")
        self.grid = grid
        self.residual = residual
        layers = conv_layers(form, dim, hidden, kernel_size)
        self.convs: Sequence[nn.Conv2d]
        self.norms: Sequence[nn.BatchNorm2d]
        self.convs = nn.ModuleList(  # type: ignore[assignment]
            nn.Conv2d(
                layer.inputs,
                layer.outputs,
                layer.kernel_size,
                padding=layer.kernel_size // 2,
                groups=layer.groups,
                bias=False,
            )
            for layer in layers
        )
        self.norms = nn.ModuleList(  # type: ignore[assignment]
            nn.BatchNorm2d(layer.outputs) for layer in layers
        )
        self.drop_path = DropPath(drop_path)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)

    def _grid(self, num_tokens: int) -> tuple[int, int]:
        side = math.isqrt(num_tokens)
        grid = self.grid or (side, side)
        if grid[0] * grid[1] != num_tokens:
            raise ValueError(f"ConvBlock: {num_tokens} tokens do not fill a grid of {grid}")
        return grid

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> tokens (B, N, C)."""
        image = x.transpose(1, 2).unflatten(2, self._grid(x.shape[1]))  # (B, C, h, w), a view
        for conv, norm in zip(self.convs, self.norms, strict=True):
            image = F.gelu(norm(conv(image)))
        out = image.flatten(2).transpose(1, 2)
        return x + self.drop_path(out) if self.residual else out
