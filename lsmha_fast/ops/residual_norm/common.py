"""Residual, stochastic depth and LayerNorm: dtypes and which results are tensors of their own."""

from __future__ import annotations

import torch
from torch import Tensor


def stream_dtype(x: Tensor, branch: Tensor | None) -> torch.dtype:
    """That of `x + branch`."""
    return x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)


def accumulator(x: Tensor, branch: Tensor | None) -> torch.dtype:
    """In what the sum, its statistics and all gradients are computed."""
    return torch.promote_types(stream_dtype(x, branch), torch.float32)


def has_own_stream(x: Tensor, branch: Tensor | None, post_norm: bool, dtype: torch.dtype) -> bool:
    """Whether the residual stream is neither `x` itself nor the normalised tensor itself."""
    if post_norm:
        return dtype != stream_dtype(x, branch)
    return branch is not None
