"""Launchers of the CUDA kernels of attention, for heads of up to 16 channels.

What nvcc 13.0 makes of the forward kernels for sm_90a (counted, not timed). "slots" are SASS
instructions per score and lane in the inner loop, where an exponential keeps its unit busy for 8
slots; "exp" is the share of the exponentials that run there, the others are polynomials. No spills.

| kernel                 | D       | registers | slots | exp  |
|------------------------|---------|-----------|-------|------|
| 16-bit                 | 1 to 4  | 126       | 4.0   | 0.75 |
| 16-bit                 | 5 to 8  | 143       | 4.2   | 0.75 |
| 16-bit                 | 9 to 16 | 163       | 4.8   | 0.75 |
| 16-bit, dropout        | 1 to 4  | 168       | 7.8   | 1    |
| fp32                   | 1 to 4  | 123       | 6.9   | 1    |
| fp32                   | 5 to 8  | 165       | 7.7   | 1    |
| fp32                   | 9 to 16 | 223       | 10.3  | 1    |

A tile of 32 queries takes about 350 slots per lane beside its loop. One that needs exact row maxima
takes 1.5 slots per score more (0.6 and 1.3 more again in fp32 from 5 and 9 channels on), and is
computed twice where that was not known. fp32 runs as tf32 products of two parts each; logits of up
to 4 channels, and all logits where maxima are exact, take a third part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import Inputs, dropout_rule


def attention(a: Inputs) -> tuple[Tensor, Tensor]:
    """Output (B, H, L, D) with the heads last in memory, and log-sum-exp (B, H, L)."""
    B, H, L, D = a.q.shape
    q, k, v = (_dense_rows(t) for t in (a.q, a.k, a.v))
    o = a.q.new_empty(B, L, H, D).transpose(1, 2)
    lse = a.q.new_empty(B, H, L, dtype=torch.float32)
    torch.ops.lsmha_fast_C_cuda.attention(q, k, v, *_options(a), o, lse)
    return o, lse


def attention_backward(
    do: Tensor, a: Inputs, o: Tensor, lse: Tensor, bias_grad: bool, dq, dk, dv
) -> tuple[Tensor, Tensor]:
    """Write dq, dk and dv in place; return dbias and dhead_scale (empty where not asked for)."""
    q, k, v, o, do = (_dense_rows(t) for t in (a.q, a.k, a.v, o, do))
    share = None if a.head_scale is None else a.q.new_empty(a.q.shape[:2], dtype=torch.float32)
    torch.ops.lsmha_fast_C_cuda.attention_backward(
        do, q, k, v, *_options(a), o, lse, dq, dk, dv, share
    )
    empty = a.q.new_empty(0)
    if a.head_scale is None or share is None:
        return empty, empty
    return empty, share.sum(0).to(a.head_scale.dtype)


def _options(a: Inputs) -> tuple:
    """key_mask, head_scale, seed, threshold, keep_factor and scale as the operators take them."""
    threshold, factor = dropout_rule(a.dropout_p)
    # 16 bits cannot say "drop all", the factor 0 does
    seed, threshold = (a.seed, min(threshold, 65535)) if threshold else (None, 0)
    head_scale = None if a.head_scale is None else a.head_scale.float().contiguous()
    return a.key_mask, head_scale, seed, threshold, factor, a.scale


def _dense_rows(t: Tensor) -> Tensor:
    """`t`, or a copy where the channels of a row are not neighbours."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()
