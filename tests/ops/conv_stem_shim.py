"""The CUDA kernels of the conv stem run by the shim of tests/cuda, called like a backend."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
import shim


def forward(x, weight, bias, need_codes=True, *, strip=1 << 20, multiprocessors=1):
    """Tokens and codes; memory that the kernel does not write stays NaN or 255."""
    B, _, H, W = x.shape
    shape = B, (H + 1) // 2 * ((W + 1) // 2), len(weight)
    out = torch.full(shape, torch.nan, dtype=x.dtype)
    arguments = {"x": x, "weight": weight, "tokens": out}
    codes = torch.full(shape, 255, dtype=torch.uint8)
    if need_codes:
        arguments["codes"] = codes
    if bias is not None:
        arguments["bias"] = bias
    shim.run(harness(), **arguments, strip=strip, multiprocessors=multiprocessors)
    return out, codes


def dweight(do, x, codes, *, strip=1 << 20, shares=1):
    """Gradients of weight and bias, fp32."""
    C, CIN = do.shape[2], x.shape[1]
    sums = torch.full((shares, C, 32), torch.nan)
    shim.run(harness(), x=x, tokens=do, codes=codes, sums=sums, strip=strip)
    total = sums.sum(0)
    return total[:, : 9 * CIN].reshape(C, CIN, 3, 3), total[:, 9 * CIN]


def harness() -> Path:
    return shim.build(Path(__file__).with_name("conv_stem_harness.cpp"))
