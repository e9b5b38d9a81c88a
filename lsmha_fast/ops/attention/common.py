"""What every backend of attention takes, and the arithmetic of its dropout probability."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The inputs of one attention call, already validated."""

    q: Tensor  # (B, H, L, D)
    k: Tensor  # (B, H, S, D)
    v: Tensor  # (B, H, S, D)
    key_mask: Tensor | None  # (B, S) bool
    bias: Tensor | None  # 4 dimensions, each 1 or that of (B, H, L, S)
    head_scale: Tensor | None  # (H,)
    seed: Tensor | None  # (1,) int64, present when dropout_p > 0
    dropout_p: float
    scale: float


def dropout_rule(dropout_p: float) -> tuple[int, float]:
    """Threshold for 16 random bits (drop when below it) and the factor of what is kept.

    The probability is rounded to a multiple of 2^-16; the factor belongs to the rounded one.
    """
    threshold = round(dropout_p * 65536)
    return threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0
