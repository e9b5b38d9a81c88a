"""The kernel configurations of `block` that are built ahead of time; see `tests/aot.py`."""

from __future__ import annotations

import torch
from aot import record_launches

from lsmha_fast.ops.block import _triton

BF16, FP32 = torch.bfloat16, torch.float32

# (rows, channels, channels of the heads, hidden units, dtype, published form of block): CCT-7 with
# few rows to many, rows of 512 channels, a pruned layer of 5 heads of 3 channels
CASES = [
    *((256 * B, 256, 256, 512, BF16, True) for B in (1, 8, 32, 512)),
    *((256 * B, 256, 256, 512, BF16, False) for B in (1, 512)),
    *((256, C, C, 2 * C, FP32, True) for C in (256, 512)),
    *((256 * B, 512, 512, 2048, BF16, True) for B in (1, 512)),
    (256, 40, 15, 80, BF16, True),
]


def aot_configs() -> list[tuple]:
    """Distinct configurations over `CASES`."""
    configs = [c for case in CASES for c in record_launches(lambda case=case: _launch(*case))]
    return list({str(config): config for config in configs}.values())


def _launch(M, C, IN, HIDDEN, dtype, published):
    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    _triton.norm_linear(empty(M, C), empty(3 * IN, C), empty(3 * IN), 1e-5)
    norm = (empty(C), empty(C)) if published else (None, None)
    _triton.project_mlp(
        empty(M, IN), empty(M, C), empty(C, IN), empty(C), *norm,
        empty(HIDDEN, C), empty(HIDDEN), empty(C, HIDDEN), empty(C), published, 1e-5,
    )  # fmt: skip
    _triton.norm_pool_linear(empty(2, 256, C), empty(C), empty(100, C), empty(100), 1e-5)
