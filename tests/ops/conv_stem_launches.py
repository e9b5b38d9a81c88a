"""The kernel configurations of the conv stem that are built ahead of time; see `tests/aot.py`."""

from __future__ import annotations

import torch
from aot import record_launches

from lsmha_fast.ops.conv_stem import _triton

# B, Cin, C, kernel, stride, padding, pixels, pool of tokenizer layers: CCT-7/3x1, CCT-2/3x2,
# CCT-14/7x2; then windows without a row to carry, and sizes of 1, which a launch makes constants
LAYERS = [
    (128, 3, 256, 3, 1, 1, 32, [3, 2, 1]),
    (128, 3, 64, 3, 1, 1, 32, [3, 2, 1]),
    (128, 64, 128, 3, 1, 1, 16, [3, 2, 1]),
    (128, 3, 64, 7, 2, 3, 224, [3, 2, 1]),
    (128, 3, 64, 5, 1, 2, 32, [2, 2, 0]),
    (1, 1, 1, 3, 1, 1, 1, [3, 2, 1]),
    (1, 5, 1, 1, 1, 0, 1, [1, 1, 0]),
]


def aot_configs() -> list[tuple]:
    """Distinct configurations of forward and backward over `LAYERS` and the dtypes."""
    dtypes = torch.float32, torch.float16, torch.bfloat16
    cases = [(dtype, *layer) for dtype in dtypes for layer in LAYERS]
    configs = [c for case in cases for c in record_launches(lambda case=case: _launch(*case))]
    return list({str(config): config for config in configs}.values())


def _launch(dtype, B, CIN, C, kernel, stride, padding, pixels, pool):
    x = torch.empty(B, CIN, pixels, pixels, dtype=dtype, device="meta")
    later_layer = CIN > 3
    if later_layer:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = x.new_empty(C, CIN, kernel, kernel)
    geometry = stride, padding, pool
    out, codes = _triton.conv_stem(x, weight, x.new_empty(C), *geometry, True)
    _triton.conv_stem_backward(out, x, weight, codes, *geometry, later_layer, True)
