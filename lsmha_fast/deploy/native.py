"""Transformer blocks of the inference form as one native call each, on a CPU.

Rows stay in a core's cache from one product to the next, norms and GELU are part of the products,
and the attention kernels read the projection as it lies in fp32. Measured in docs/latency.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._ext import ext_missing
from ..ops.attention.op import default_backend
from .form import Encoder
from .layers import Dense

# columns of a panel of packed weights, as in csrc/cpu/dense.h
PANEL = 32


class NativeEncoder(nn.Module):
    """`Encoder` as one call; weights lie in panels, and what is not a product computes in fp32."""

    def __init__(self, block: Encoder):
        super().__init__()
        pre_norm, norm = block.pre_norm, block.norm1
        self.num_heads = block.num_heads
        self.sizes = (block.num_heads, block.head_dim, pre_norm.eps, norm.eps)
        affine = [None, None] if norm.weight is None else [norm.weight.float(), norm.bias.float()]
        before = (*panels(block.qkv), *panels(block.proj))
        # a tuple, as in `PackedDense`: nothing may move or convert it
        self.packed = (*before, *affine, *panels(block.fc1), *panels(block.fc2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return torch.ops.lsmha_fast_C.encoder.default(x.contiguous(), *self.sizes, *self.packed)


def panels(dense: Dense) -> tuple[Tensor, Tensor]:
    """Weight as panels of columns, inner numbers first and bfloat16 in pairs; bias in fp32.

    Both sizes are padded with zeros to multiples of `PANEL`.
    """
    out, inner = dense.weight.shape
    weight = F.pad(dense.weight, (0, -inner % PANEL, 0, -out % PANEL))
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    weight = weight.unflatten(0, (-1, PANEL)).unflatten(2, (-1, pair)).transpose(1, 2)
    bias = weight.new_zeros(out) if dense.bias is None else dense.bias
    return weight.flatten().contiguous(), F.pad(bias.float(), (0, -out % PANEL))


def native_missing(block: Encoder) -> str | None:
    """Reason why a block is not one native call, or why that would be slower, or None."""
    dtype = block.qkv.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return f"there are no panels of {dtype}"
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        return "without AVX2 nothing was measured"
    multiplies = capability == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    if dtype == torch.bfloat16 and not multiplies:
        return "this processor multiplies no vectors of bfloat16"
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return "oneDNN multiplies bfloat16 on tiles, which panels do not use"
    q = torch.empty(1, block.num_heads, 1, block.head_dim)
    if (block.backend or default_backend(q)) != "cpp":
        return f"its attention is to run on backend {block.backend or default_backend(q)!r}"
    return ext_missing()


def nativise(form: nn.Module) -> None:
    """Replace every transformer block of a plain form on a CPU by its native call, in place."""
    for module in list(form.modules()):
        for name, child in module.named_children():
            if isinstance(child, Encoder) and native_missing(child) is None:
                setattr(module, name, NativeEncoder(child))
