"""Triton: pool the tokens of every head, the forward step that two ops share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_utils import next_pow2

# channels per program: 128 bytes of a token in half precision, so whole cache lines are read
COLUMNS = 64
# elements at a time, 16 per thread of 8 warps: 80 registers forward, 128 backward (32: 160, 250)
TILE = 4096


@triton.jit
def _pool_heads_fwd(
    x_ptr,
    x_stride,
    weight_ptr,
    pooled_ptr,
    lse_ptr,
    N,
    H,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    channels = (h < H)[:, None] & (d < D)[None, :]  # [BLOCK_H, BLOCK_D]
    hd = h[:, None] * D + d[None, :]
    weight = tl.load(weight_ptr + hd, mask=channels, other=0.0).to(tl.float32)

    x_ptr += b * x_stride[0]
    offset = n[:, None, None] * x_stride[1]
    offset += (h[:, None] * x_stride[2] + d[None, :] * x_stride[3])[None]
    top = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        valid = start + n < N
        mask = valid[:, None, None] & channels[None]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        score = tl.sum(x * weight[None], axis=2)  # [BLOCK_N, BLOCK_H]
        score = tl.where(valid[:, None], score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, axis=0))
        keep = tl.exp(top - new_top)
        e = tl.exp(score - new_top[None])
        total = total * keep + tl.sum(e, axis=0)
        acc = acc * keep[:, None] + tl.sum(e[:, :, None] * x, axis=0)
        top = new_top
        # the base moves in 64 bits, the offsets inside a tile stay in 32
        x_ptr += BLOCK_N * x_stride[1]

    tl.store(pooled_ptr + b * H * D + hd, acc / total[:, None], mask=channels)
    tl.store(lse_ptr + b * H + h, top + tl.log(total), mask=h < H)


def blocks(N: int, H: int, D: int) -> tuple[dict[str, int], int]:
    """Tile sizes for (N, H, D) tokens, and the number of warps that hold such a tile."""
    BLOCK_D = next_pow2(D)
    BLOCK_H = min(next_pow2(H), max(1, COLUMNS // BLOCK_D))
    BLOCK_N = min(next_pow2(N), max(1, TILE // (BLOCK_H * BLOCK_D)))
    num_warps = max(1, min(8, BLOCK_N * BLOCK_H * BLOCK_D // 512))
    return {"BLOCK_N": BLOCK_N, "BLOCK_H": BLOCK_H, "BLOCK_D": BLOCK_D}, num_warps


def pool_heads(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pool (B, N, H, D) tokens of any strides to fp32 (B, H, D); also the fp32 lse (B, H)."""
    B, N, H, D = x.shape
    pooled = x.new_empty(B, H, D, dtype=torch.float32)
    lse = x.new_empty(B, H, dtype=torch.float32)
    if pooled.numel():
        tile, num_warps = blocks(N, H, D)
        grid = (B, triton.cdiv(H, tile["BLOCK_H"]))
        _pool_heads_fwd[grid](
            x, x.stride(), weight.contiguous(), pooled, lse, N, H, D, **tile, num_warps=num_warps
        )
    return pooled, lse


# the shapes that kernels are compiled for ahead of time: (N, H, D), from 256 heads to one
AOT_SHAPES = [(256, 256, 1), (256, 128, 2), (256, 64, 4), (64, 32, 8), (256, 10, 32), (256, 1, 256)]
AOT_DTYPES = ["bf16", "fp32"]


def forward_configs():
    """Configurations for `tests/aot.py`."""
    for N, H, D in AOT_SHAPES:
        tile, num_warps = blocks(N, H, D)
        for dtype in AOT_DTYPES:
            signature = {
                "x_ptr": f"*{dtype}:16",
                "x_stride": ("i32:16", "i32:16", "i32", "i32:1"),
                "weight_ptr": "*fp32:16",
                "pooled_ptr": "*fp32:16",
                "lse_ptr": "*fp32:16",
                **{"N": "i32:16", "H": "i32", "D": "i32"},
            }
            yield _pool_heads_fwd, signature, tile, num_warps, 1
