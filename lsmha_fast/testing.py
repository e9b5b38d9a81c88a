"""Helpers shared by tests and benchmarks: the error rule and unwritten-memory checks."""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import Tensor

# glibc's option to fill memory that it gives out, with the bits of a byte turned over
M_PERTURB = -6


def assert_no_worse(actual: Tensor, low: Tensor, high: Tensor, factor: float = 2.0) -> None:
    """`actual` may be `factor` times as far from the fp64 result `high` as `low`, same dtype, is.

    Args:
        actual: what a kernel gave.
        low: the plain PyTorch result in the kernel's dtype, from the same inputs.
        high: the fp64 result from the same inputs (already rounded to the low dtype).
        factor: 2 for outputs, 3 for gradients.

    Raises:
        AssertionError: wrong shape, wrong dtype, not finite, or too far away.
    """
    assert actual.shape == high.shape, f"shape {tuple(actual.shape)} != {tuple(high.shape)}"
    assert actual.dtype == low.dtype, f"dtype {actual.dtype} != {low.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), "not finite"
    high = high.double()
    rounding = torch.finfo(low.dtype).eps * high.abs().max()
    error, allowed = ((t.double() - high).abs().max() for t in (actual, low))
    assert error <= factor * (allowed + rounding), (
        f"error {error:.2e} > {factor} * ({allowed:.2e} + {rounding:.2e})"
    )


@contextlib.contextmanager
def nan_filled_empty():
    """Make `torch.empty`, `empty_like`, `new_empty` and `empty_strided` return NaN (or -1) inside
    the block, so that output memory which a kernel did not write shows up in the values.

    What native code allocates by itself holds 3.4e38 then, where the C library is glibc.
    """

    def fill(make):
        def filled(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan") if t.is_floating_point() else -1)

        return filled

    saved = [
        (torch, "empty", torch.empty),
        (torch, "empty_like", torch.empty_like),
        (torch, "empty_strided", torch.empty_strided),
        (torch.Tensor, "new_empty", torch.Tensor.new_empty),
        (torch.Tensor, "new_empty_strided", torch.Tensor.new_empty_strided),
    ]
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
    try:
        for owner, name, make in saved:
            setattr(owner, name, fill(make))
        mallopt(M_PERTURB, 0x80)
        yield
    finally:
        mallopt(M_PERTURB, 0)
        for owner, name, make in saved:
            setattr(owner, name, make)
