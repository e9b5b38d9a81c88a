"""Class sums of pooled vectors in Triton: pool every image, then add each class in batch order.

The workspace between the two kernels is one pooled vector per image: B * H * D fp32 numbers, 1/N
of the tokens. No float is added by an atomic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._pool_heads_triton import forward_configs, pool_heads
from .._triton_utils import next_pow2

# images per step and columns per program: 64 columns are two cache lines of fp32
BLOCK_B, MAX_BLOCK_C = 32, 64


@triton.jit
def _class_sums(
    pooled_ptr,
    order_ptr,
    ends_ptr,
    counts_ptr,
    sums_ptr,
    C,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_B)
    count = tl.load(counts_ptr + k)
    order_ptr += tl.load(ends_ptr + k) - count
    acc = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, count, BLOCK_B):
        image = tl.load(order_ptr + start + i, mask=start + i < count, other=0)  # int64
        mask = (start + i < count)[:, None] & (c < C)[None, :]
        row = tl.load(pooled_ptr + image[:, None] * C + c[None, :], mask=mask, other=0.0)
        acc += tl.sum(row, axis=0)
    tl.store(sums_ptr + k * C + c, acc, mask=c < C)


def head_class_sums(
    x: Tensor, weight: Tensor, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Sums (K, H, D) in fp32 and counts (K,); no step waits for the device."""
    H, D = weight.shape
    counts = labels.new_zeros(num_classes).index_add_(0, labels, torch.ones_like(labels))
    sums = x.new_zeros(num_classes, H, D, dtype=torch.float32)
    if x.numel():
        pooled, _ = pool_heads(x, weight)
        order = labels.argsort(stable=True)
        block_c = min(MAX_BLOCK_C, next_pow2(H * D))
        grid = (num_classes, triton.cdiv(H * D, block_c))
        _class_sums[grid](
            pooled, order, counts.cumsum(0), counts, sums, H * D, BLOCK_B=BLOCK_B, BLOCK_C=block_c
        )
    return sums, counts


def aot_configs():
    """Every kernel of this op for shapes of real models, for `tests/aot.py`."""
    yield from forward_configs()
    for block_c in (1, 16, MAX_BLOCK_C):
        signature = {
            "pooled_ptr": "*fp32:16",
            "order_ptr": "*i64:16",
            "ends_ptr": "*i64:16",
            "counts_ptr": "*i64:16",
            "sums_ptr": "*fp32:16",
            "C": "i32",
        }
        yield _class_sums, signature, {"BLOCK_B": BLOCK_B, "BLOCK_C": block_c}, 4, 1
