"""Linear maps that PyTorch may compute as 1 x 1 convolutions, where its products are the slower."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Measured by `pytest benchmarks/bench_linear.py`: with fewer rows or channels, one of the two is
# ahead by the shape; from here on the convolution is, by 1.2 to 2.3 times, with the gradient, too.
MIN_ROWS = 512
MIN_CHANNELS = 64
# PyTorch gives 1 x 1 convolutions of fewer images to the same products as `F.linear`, on one thread
IMAGES = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by whichever library of PyTorch's is the faster on this processor.

    Its fp32 products are MKL's, which leaves the AVX-512 of AMD processors unused; its convolutions
    are oneDNN's, which does not. The same sums in another order.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,).

    Returns:
        (..., out).
    """
    if not _as_convolution(x, weight):
        return F.linear(x, weight, bias)
    images = x.reshape(IMAGES, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (16, in, rows, 1)
    out = F.conv2d(images, weight[:, :, None, None]).permute(0, 2, 3, 1)
    out = out.reshape(*x.shape[:-1], len(weight))
    # the convolution's own bias gradient is one long sum, with 20 times the error of `Tensor.sum`
    return out if bias is None else out.add_(bias)


class Linear(nn.Linear):
    """`nn.Linear` that computes by `linear`; parameters and state_dict are the same."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(input, self.weight, self.bias)


def _as_convolution(x: Tensor, weight: Tensor) -> bool:
    if type(x) is not Tensor or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    return (
        rows >= MIN_ROWS
        and rows % IMAGES == 0
        and min(weight.shape) >= MIN_CHANNELS
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and convolutions_win()
    )


@functools.cache
def convolutions_win() -> bool:
    """Whether this processor's AVX-512 is left unused by MKL, but not by oneDNN."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and _is_amd()
    )


# torch.compile then calls it instead of tracing it
convolutions_win._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
