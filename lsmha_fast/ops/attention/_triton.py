"""Launchers of the Triton kernels of attention, and the block sizes they use.

What Triton 3.8 makes of them for sm_90, bf16, 256 tokens (built ahead of time, not timed). "slots"
are SASS instructions per score and lane in the inner loop; an exponential keeps its unit busy for
8 slots. No spills.

| kernel             | D  | registers | shared | slots |
|--------------------|----|-----------|--------|-------|
| forward            | 1  | 213       | 18 KB  | 5.5   |
| forward            | 4  | 205       | 22 KB  | 5.4   |
| forward            | 16 | 203       | 22 KB  | 6.3   |
| forward, dropout   | 4  | 220       | 18 KB  | 14.9  |
| backward           | 1  | 211       | 24 KB  | 10.7  |
| backward           | 4  | 174       | 16 KB  | 13.3  |
| backward           | 16 | 166       | 16 KB  | 12.5  |
| backward, dropout  | 4  | 211       | 16 KB  | 24.2  |

The row maximum is exact. The bound |q_i| max_j |k_j| in its place counts 4.7 slots at D = 4, which
is no gain below the 8 of the exponential, and it underflows fp16 weights and knows no bias.
The row sum comes from a column of ones in v where D leaves one free (D < 16, no dropout).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._triton_utils import next_pow2
from ._triton_bwd import _attention_bwd, _attention_bwd_bias
from ._triton_fwd import _attention_fwd
from .common import Inputs, dropout_rule

# programs that fill a large GPU about twice (132 multiprocessors, two programs on each)
FULL_GPU = 512
# the depth of a tensor-core product; the interpreter would take less, the hardware does not
MIN_BLOCK_D = 16


class Blocks(NamedTuple):
    """Tile of queries x keys, and how a program runs it."""

    L: int
    S: int
    warps: int
    stages: int


def _fwd_blocks(a: Inputs) -> Blocks:
    S, D = a.k.shape[2:]
    if a.q.dtype == torch.float32:
        # full-precision products run on the ordinary units and keep whole rows in registers
        return Blocks(16, 64, 4, 1)
    if a.bias is not None or D > 32:
        return Blocks(64 if a.bias is None else 32, 64, 4, 1)
    # with all keys in one block the softmax needs no rescaling and k, v are loaded once per head;
    # 64 x 256 scores fill half of the register file and leave no room for dropout or prefetching
    widest = 256 if S <= 256 and D <= 16 and a.seed is None else 128
    return Blocks(64, min(max(next_pow2(S), 64), widest), 4, 2)


def _bwd_blocks(a: Inputs, align: int) -> Blocks:
    D, plain = a.q.shape[3], a.bias is None
    if a.q.dtype == torch.float32:
        # more warps spread the registers thinner; these counts are those without spills
        return Blocks(16, 64, 8 if plain == (D <= 16) else 16, 1)
    # scores, their gradients and the sums dk, dv are in registers at once: 64 x 128 spills, and so
    # does 64 x 64 beside a bias, wide heads, or the addresses of rows that vectors do not divide
    roomy = plain and D <= 32 and (D < 4 or D % 4 == 0)
    if not roomy:
        return Blocks(32, 64, 8, 1)
    # rows that start at odd places cannot be copied asynchronously: two warps, which multiply from
    # registers, then need half the instructions per score, and Triton 3.6 cannot build four
    return Blocks(64, 64, 2 if align < 4 and D <= 16 else 4, 1)


def attention(a: Inputs) -> tuple[Tensor, Tensor]:
    """Output (B, H, L, D) with the heads last in memory, and log-sum-exp (B, H, L)."""
    a = _readable(a)
    B, H, L, D = a.q.shape
    S = a.k.shape[2]
    o = a.q.new_empty(B, L, H, D).transpose(1, 2)
    lse = a.q.new_empty(B, H, L, dtype=torch.float32)
    blocks = _fwd_blocks(a)
    threshold, keep_factor = _dropout(a)
    # few heads: several programs share the queries of one; the sums of a row stay in one program
    shares = min(triton.cdiv(L, blocks.L), triton.cdiv(FULL_GPU, B * H))
    _attention_fwd[(B * H, shares)](
        *_common(a), o, o.stride(), lse, H, L, S,
        a.scale * math.log2(math.e), threshold, keep_factor,
        **_constants(D, S, blocks, _align(a.q, a.k, a.v, o)),
        ONE_BLOCK=S <= blocks.S, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return o, lse


def attention_backward(
    do: Tensor, a: Inputs, o: Tensor, lse: Tensor, bias_grad: bool, dq, dk, dv
) -> tuple[Tensor, Tensor]:
    """Write dq, dk and dv in place; return dbias and dhead_scale (empty where not asked for)."""
    a, do = _readable(a), _block_fits_32_bits(do)
    B, H, L, D = a.q.shape
    S = a.k.shape[2]
    align = _align(a.q, a.k, a.v, o, do, dq, dk, dv)
    blocks = _bwd_blocks(a, align)
    threshold, keep_factor = _dropout(a)
    scale2 = a.scale * math.log2(math.e)
    one_block = S <= blocks.S
    scratch = None if one_block else a.q.new_empty(B, H, L, D, dtype=torch.float32)
    partial = None if a.head_scale is None else a.q.new_empty(B, H, dtype=torch.float32)
    outputs = [t for grad in (dq, dk, dv) for t in (grad, grad.stride())]
    constants = _constants(D, S, blocks, align)
    launch = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    _attention_bwd[(B * H,)](
        *_common(a), o, o.stride(), lse, do, do.stride(),
        *outputs, scratch, (0, 0, 0, 0) if one_block else scratch.stride(), partial,
        H, L, S, a.scale, scale2, threshold, keep_factor,
        **constants, ONE_BLOCK=one_block, **launch,
    )  # fmt: skip
    empty = a.q.new_empty(0)
    dhead_scale = empty if partial is None else partial.sum(0).to(a.head_scale.dtype)
    if not bias_grad:
        return a.q.new_empty(0), dhead_scale

    over = [n == 1 and m > 1 for n, m in zip(a.bias.shape, (B, H, L, S), strict=True)]
    tiles_l, tiles_s = triton.cdiv(L, blocks.L), triton.cdiv(S, blocks.S)
    tiles = (1 if over[2] else tiles_l) * (1 if over[3] else tiles_s)
    images = a.bias.shape[0] * a.bias.shape[1]
    terms = B * H * tiles_l * tiles_s // (tiles * images)
    parts = min(terms, triton.cdiv(FULL_GPU, tiles * images))
    part = a.q.new_empty(parts, *a.bias.shape, dtype=torch.float32)
    _attention_bwd_bias[(tiles, images, parts)](
        *_common(a), o, o.stride(), lse, do, do.stride(), part,
        B, H, L, S, scale2, threshold, keep_factor, *over, **constants, **launch,
    )  # fmt: skip
    return part.sum(0).to(a.bias.dtype), dhead_scale


def _common(a: Inputs) -> tuple:
    """The arguments that all kernels begin with."""
    shape = (*a.q.shape[:3], a.k.shape[2])
    bias = None if a.bias is None else _block_fits_32_bits(a.bias.expand(shape))
    return (
        a.q, a.q.stride(), a.k, a.k.stride(), a.v, a.v.stride(),
        a.key_mask, (0, 0) if a.key_mask is None else a.key_mask.stride(),
        bias, (0, 0, 0, 0) if bias is None else bias.stride(), a.head_scale, a.seed,
    )  # fmt: skip


def _align(*tensors: Tensor) -> int:
    """Elements that every row starts at a multiple of, at most 16."""
    return math.gcd(16, *(n for t in tensors for n in t.stride()[:3]))


def _constants(D: int, S: int, blocks: Blocks, align: int) -> dict:
    return {
        "D": D,
        "BLOCK_L": blocks.L,
        "BLOCK_S": blocks.S,
        "BLOCK_D": max(next_pow2(D), MIN_BLOCK_D),
        "WHOLE": S % blocks.S == 0,
        "ALIGN": align,
        "PRECISION": "ieee",
    }


def _dropout(a: Inputs) -> tuple[int, float]:
    """Threshold and factor for the kernels; 16 bits cannot say "drop all", the factor 0 does."""
    threshold, factor = dropout_rule(a.dropout_p) if a.seed is not None else (0, 1.0)
    return min(threshold, 65535), factor


def _readable(a: Inputs) -> Inputs:
    q, k, v = (_block_fits_32_bits(t) for t in (a.q, a.k, a.v))
    scale = None if a.head_scale is None else a.head_scale.contiguous()
    return a._replace(q=q, k=k, v=v, head_scale=scale)


def _block_fits_32_bits(t: Tensor) -> Tensor:
    """`t`, or a copy in the freak case that 256 of its rows span 2^31 elements."""
    return t if 256 * max(t.stride(2), t.stride(3)) < 2**31 else t.contiguous()
