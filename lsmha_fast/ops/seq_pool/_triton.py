"""Sequence pooling in Triton: one program per image and group of heads, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._pool_heads_triton import AOT_DTYPES, AOT_SHAPES, blocks, forward_configs, pool_heads


@triton.jit
def _seq_pool_bwd(
    do_ptr,
    do_stride,
    x_ptr,
    x_stride,
    weight_ptr,
    pooled_ptr,
    lse_ptr,
    dx_ptr,
    partial_ptr,
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
    do_ptr += b * do_stride[0]
    do_offset = h[:, None] * do_stride[1] + d[None, :] * do_stride[2]
    do = tl.load(do_ptr + do_offset, mask=channels, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + hd, mask=channels, other=0.0).to(tl.float32)
    pooled = tl.load(pooled_ptr + b * H * D + hd, mask=channels, other=0.0)
    lse = tl.load(lse_ptr + b * H + h, mask=h < H, other=0.0)
    delta = tl.sum(do * pooled, axis=1)  # [BLOCK_H]

    x_ptr += b * x_stride[0]
    dx_ptr += b * N * H * D
    offset = n[:, None, None] * x_stride[1]
    offset += (h[:, None] * x_stride[2] + d[None, :] * x_stride[3])[None]
    dx_offset = n[:, None, None] * (H * D) + hd[None]
    dweight = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        valid = start + n < N
        mask = valid[:, None, None] & channels[None]
        # absent tokens are read as zeros, which keeps them out of dweight
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        p = tl.exp(tl.sum(x * weight[None], axis=2) - lse[None])  # [BLOCK_N, BLOCK_H]
        ds = p * (tl.sum(x * do[None], axis=2) - delta[None])
        dx = p[:, :, None] * do[None] + ds[:, :, None] * weight[None]
        tl.store(dx_ptr + dx_offset, dx, mask=mask)
        dweight += tl.sum(ds[:, :, None] * x, axis=0)
        x_ptr += BLOCK_N * x_stride[1]
        dx_ptr += BLOCK_N * H * D
    tl.store(partial_ptr + b * H * D + hd, dweight, mask=channels)


def seq_pool(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled vectors (B, H, D) and logsumexp (B, H) in fp32."""
    return pool_heads(x, weight)


def seq_pool_backward(
    do: Tensor, x: Tensor, weight: Tensor, pooled: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens and of the weight; the latter is summed over images by torch."""
    B, N, H, D = x.shape
    dx = x.new_empty(x.shape)
    partial = x.new_empty(B, H, D, dtype=torch.float32)
    if partial.numel():
        tile, num_warps = blocks(N, H, D)
        grid = (B, triton.cdiv(H, tile["BLOCK_H"]))
        _seq_pool_bwd[grid](
            do,
            do.stride(),
            x,
            x.stride(),
            weight.contiguous(),
            pooled,
            lse,
            dx,
            partial,
            N,
            H,
            D,
            **tile,
            num_warps=num_warps,
        )
    return dx, partial.sum(0).to(weight.dtype)


def aot_configs():
    """Every kernel of this file for shapes of real models, for `tests/aot.py`."""
    yield from forward_configs()
    for N, H, D in AOT_SHAPES:
        tile, num_warps = blocks(N, H, D)
        for dtype in AOT_DTYPES:
            signature = {
                "do_ptr": f"*{dtype}:16",
                "do_stride": ("i32:16", "i32", "i32:1"),
                "x_ptr": f"*{dtype}:16",
                "x_stride": ("i32:16", "i32:16", "i32", "i32:1"),
                "weight_ptr": "*fp32:16",
                "pooled_ptr": "*fp32:16",
                "lse_ptr": "*fp32:16",
                "dx_ptr": f"*{dtype}:16",
                "partial_ptr": "*fp32:16",
                **{"N": "i32:16", "H": "i32", "D": "i32"},
            }
            yield _seq_pool_bwd, signature, tile, num_warps, 1
