"""The kernel configurations of attention that are built ahead of time; see `tests/aot.py`."""

from __future__ import annotations

import torch
from aot import record_launches

from lsmha_fast.ops.attention import _triton
from lsmha_fast.ops.attention.common import Inputs

CHANNELS = 256
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# (tokens, head dim, dtype, dropout, with bias, key mask and head scale); every length and head dim
# with every dtype and dropout would be 500 builds, which differ in little
CASES = [
    *((256, D, BF16, False, False) for D in (1, 2, 4, 8, 16, 32, 64)),
    *((N, 4, BF16, False, False) for N in (64, 196, 512)),
    *((N, 16, BF16, True, False) for N in (64, 196, 1024)),
    *((1024, D, BF16, True, False) for D in (1, 4, 32, 64)),
    *((196, D, BF16, True, False) for D in (5, 13)),
    *((256, 4, FP16, dropout, False) for dropout in (False, True)),
    *((196, D, FP32, dropout, False) for D in (1, 4, 64) for dropout in (False, True)),
    (196, 8, BF16, True, True),
    (1024, 64, BF16, False, True),
    (196, 16, FP32, True, True),
]


def aot_configs() -> list[tuple]:
    """Distinct configurations of forward and backward over `CASES`."""
    configs = [c for case in CASES for c in record_launches(lambda case=case: _launch(*case))]
    return list({str(config): config for config in configs}.values())


def _launch(N, D, dtype, dropout, extras, B=2):
    H = CHANNELS // D

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = (t.transpose(1, 2) for t in empty(B, N, 3, H, D).unbind(2))
    a = Inputs(
        q, k, v,
        key_mask=empty(B, N, dtype=torch.bool) if extras else None,
        bias=empty(1, H, N, N) if extras else None,
        head_scale=empty(H) if extras else None,
        seed=empty(1, dtype=torch.int64) if dropout else None,
        dropout_p=0.1 if dropout else 0.0,
        scale=D**-0.5,
    )  # fmt: skip
    o, lse = _triton.attention(a)
    grads = (t.transpose(1, 2) for t in empty(B, N, 3, H, D).unbind(2))
    _triton.attention_backward(o, a, o, lse, extras, *grads)
