"""Linear maps and convolutions of the inference form, plain or with weights packed for oneDNN.

On a CPU, PyTorch's own `linear` gives fp32 products to MKL, which leaves AVX-512 of some processors
unused, and sorts the weights anew at every call. oneDNN keeps them sorted and takes GELU and the
residual into the product. Measured in docs/latency.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fold import Affine


class Dense(nn.Module):
    """gelu(x W^T + b) + residual, with or without either.

    Args:
        affine: weight (out, in) and bias (out,).
        gelu: apply the exact GELU.
        dtype: of weights and tokens.
    """

    def __init__(self, affine: Affine, dtype: torch.dtype, *, gelu: bool = False):
        super().__init__()
        self.gelu = gelu
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", affine.weight.to(dtype))
        self.register_buffer("bias", None if affine.bias is None else affine.bias.to(dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out)."""
        out = F.linear(x, self.weight, self.bias)
        out = F.gelu(out) if self.gelu else out
        return out if residual is None else residual + out


class Convolution(nn.Module):
    """gelu(conv(x) + b), stride 1, "same" padding; tokens are a channels-last image of the grid.

    Args:
        affine: weight (out, in / groups, k, k) and bias (out,).
        grid: rows and columns of tokens.
        groups: 1, or the channels where the convolution is depthwise.
        dtype: of weights and tokens.
    """

    def __init__(self, affine: Affine, dtype: torch.dtype, *, grid: tuple[int, int], groups: int):
        super().__init__()
        self.grid = grid
        pads = [affine.weight.shape[-1] // 2] * 2
        self.geometry = (pads, [1, 1], [1, 1], groups)  # padding, stride, dilation, groups
        self.weight: Tensor
        self.bias: Tensor | None
        weight = affine.weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if affine.bias is None else affine.bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in) -> (B, N, out)."""
        padding, stride, dilation, groups = self.geometry
        image = x.transpose(1, 2).unflatten(2, self.grid)  # (B, in, h, w), a view
        out = F.conv2d(image, self.weight, self.bias, stride, padding, dilation, groups)
        return F.gelu(out).flatten(2).transpose(1, 2)


class PackedDense(nn.Module):
    """`Dense` whose weight is sorted for oneDNN; a residual needs one without GELU."""

    def __init__(self, dense: Dense, rows: int):
        super().__init__()
        self.post: tuple = ("gelu", [], "none") if dense.gelu else ("none", [], "")
        self.bias = dense.bias
        # opaque: neither a parameter nor a buffer, so that nothing moves or converts it
        self.packed = (torch.ops.mkldnn._reorder_linear_weight(dense.weight, rows),)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out)."""
        ops = torch.ops.mkldnn._linear_pointwise
        if residual is None:
            return ops.default(x, self.packed[0], self.bias, *self.post)
        return ops.binary(x, residual, self.packed[0], self.bias, "add")


class PackedConvolution(nn.Module):
    """`Convolution` whose weight is sorted for oneDNN."""

    def __init__(self, conv: Convolution, batch: int):
        super().__init__()
        self.grid, self.geometry, self.bias = conv.grid, conv.geometry, conv.bias
        size = (batch, conv.weight.shape[1] * conv.geometry[-1], *conv.grid)
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self.packed = (reorder(conv.weight, *self.geometry, size),)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in) -> (B, N, out)."""
        image = x.transpose(1, 2).unflatten(2, self.grid)  # (B, in, h, w), a view
        out = torch.ops.mkldnn._convolution_pointwise.default(
            image, self.packed[0], self.bias, *self.geometry, "gelu", [], "none"
        )
        return out.flatten(2).transpose(1, 2)


def packing_missing(dtype: torch.dtype) -> str | None:
    """Reason why oneDNN cannot take packed weights of this dtype on this processor, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN"
    if dtype == torch.bfloat16:
        return None if _has_bf16() else "this processor multiplies no bfloat16"
    return None if dtype == torch.float32 else f"oneDNN packs no weights of {dtype}"


def _has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def pack(model: nn.Module, batch: int, num_tokens: int) -> None:
    """Replace every `Dense` and `Convolution` of a model by its packed form, in place.

    Args:
        model: an inference form on a CPU.
        batch: images of the call to pack for; other batches work, too.
        num_tokens: N.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Dense):
                setattr(module, name, PackedDense(child, batch * num_tokens))
            elif isinstance(child, Convolution):
                setattr(module, name, PackedConvolution(child, batch))
