"""ConvStem: images (B, 3, H, W) -> tokens (B, N, C)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from ..ops import conv_stem
from ._autocast import autocast_dtype

POOL = (3, 2, 1)  # kernel, stride, padding of the published tokenizer's max pooling


class ConvStem(nn.Module):
    """CCT's convolutional tokenizer: n x (convolution, ReLU, max pooling), then tokens.

    Source: arXiv 2104.05704 and SHI-Labs/Compact-Transformers `src/utils/tokenizer.py`.

    Args:
        dim: channels of a token.
        in_channels: channels of the image.
        num_layers: number of convolutions; those before the last have `hidden` channels.
        kernel_size, stride, padding: of every convolution; the published rule for a kernel k is
            stride max(1, k // 2 - 1) and padding max(1, k // 2), used where None is given.
        hidden: channels between two convolutions.
        bias: bias of the convolutions (published: none).
        backend: see `lsmha_fast.ops.conv_stem`.
    """

    def __init__(
        self,
        dim: int,
        *,
        in_channels: int = 3,
        num_layers: int = 1,
        kernel_size: int = 3,
        stride: int | None = None,
        padding: int | None = None,
        hidden: int = 64,
        bias: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        self.convs: Sequence[nn.Conv2d]
        self.stride = max(1, kernel_size // 2 - 1) if stride is None else stride
        self.padding = max(1, kernel_size // 2) if padding is None else padding
        self.backend = backend
        widths = [in_channels, *[hidden] * (num_layers - 1), dim]
        self.convs = nn.ModuleList(  # type: ignore[assignment]
            nn.Conv2d(a, b, kernel_size, self.stride, self.padding, bias=bias)
            for a, b in pairwise(widths)
        )
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)

    def _layer_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns after one convolution and its pooling."""
        k = self.convs[0].kernel_size[0]
        kernel, stride, padding = POOL

        def after(n: int) -> int:
            n = (n + 2 * self.padding - k) // self.stride + 1
            return (n + 2 * padding - kernel) // stride + 1

        return after(height), after(width)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for an image of this size."""
        size = (height, width)
        for _ in self.convs:
            size = self._layer_grid(*size)
        if min(size) < 1:
            raise ValueError(
                f"ConvStem: an image of {height}x{width} is too small for {len(self.convs)} layers"
            )
        return size

    def forward(self, x: Tensor) -> Tensor:
        """Turn images (B, in_channels, H, W) into tokens (B, N, dim), N row-major."""
        x = x.to(autocast_dtype(x))
        for i, conv in enumerate(self.convs):
            tokens = conv_stem(
                x,
                conv.weight.to(x.dtype),
                None if conv.bias is None else conv.bias.to(x.dtype),
                stride=self.stride,
                padding=self.padding,
                pool=POOL,
                backend=self.backend,
            )
            if i + 1 < len(self.convs):
                # tokens are a channels-last image: a view, no copy
                x = tokens.transpose(1, 2).unflatten(2, self._layer_grid(*x.shape[2:]))
        return tokens
