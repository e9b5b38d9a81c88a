"""Attention by the native CPU kernels: float32 and bfloat16 on vectors, float64 plainly.

Clock cycles per 16 weights on one core, 256 tokens, tensors in the cache, as
`python -m benchmarks.cpu_cycles` printed them on an AMD EPYC of family 26 (Zen 5: two 512-bit
multiply-adds a cycle, 4.15 GHz), beside the least that the multiply-adds take with AVX-512 (2 D
forward, 5 D backward, 3 for the exponential, 1 more for the gradient; half a cycle each):

|    | AVX-512 |       |              |          |       | AVX2    |              |          |
| D  | forward | least | with dropout | backward | least | forward | with dropout | backward |
|----|---------|-------|--------------|----------|-------|---------|--------------|----------|
| 1  | 4.0     | 2.5   | 4.7          | 6.8      | 4.5   | 10.8    | 12.1         | 16.0     |
| 2  | 5.4     | 3.5   | 6.0          | 10.3     | 7     | 14.0    | 16.6         | 24.3     |
| 4  | 8.5     | 5.5   | 9.1          | 19.4     | 12    | 22.4    | 24.9         | 42.2     |
| 8  | 16.9    | 9.5   | 17.7         | 43.6     | 22    | 40.8    | 44.3         | 91.4     |
| 16 | 22.4    | 18.5  | 22.9         | 55.9     | 43    | 57.2    | 59.3         | 117.9    |
| 32 | 39.6    | 34.5  | 40.1         | 91.0     | 83    | 99.1    | 101.4        | 224.5    |

Dropout's random bits take 6.5 more (12.5 with AVX2), in each pass. At D = 1 the 12 instructions of
a weight, of all kinds, bound the forward pass before the multiply-adds do. From 16 channels on the
weights go through the cache, and the exponential has 5 multiply-adds, which the least counts.

Averaged weights have a kernel of their own, as they need the sum of a row before any weight of it:
all keys of a few queries stay in the cache, so each weight is computed once for the output and the
average. The reference's passes take 2 (64 channels) to 10 times as long (4 channels, 256 tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import Inputs, dropout_rule

# sums of the bias gradient that may run in parallel; fixed, so that no bit depends on the threads
BIAS_PARTS = 16


def attention(a: Inputs) -> tuple[Tensor, Tensor]:
    """Output (B, H, L, D) with the heads last in memory, and log-sum-exp (B, H, L)."""
    B, H, L, D = a.q.shape
    o = a.q.new_empty(B, L, H, D).transpose(1, 2)
    lse = a.q.new_empty(B, H, L, dtype=_accumulator(a.q))
    torch.ops.lsmha_fast_C.attention.default(*_arguments(a), o, lse)
    return o, lse


def attention_backward(
    do: Tensor, a: Inputs, o: Tensor, lse: Tensor, bias_grad: bool, dq, dk, dv
) -> tuple[Tensor, Tensor]:
    """Write dq, dk and dv in place; return dbias and dhead_scale (empty where not asked for)."""
    B, H = a.q.shape[:2]
    empty, acc = a.q.new_empty(0), _accumulator(a.q)
    dhead_scale = None if a.head_scale is None else a.q.new_empty(B, H, dtype=acc)
    dbias = _bias_parts(a, bias_grad)
    torch.ops.lsmha_fast_C.attention_backward.default(
        _readable(do), *_arguments(a), _readable(o), lse, dq, dk, dv, dbias, dhead_scale
    )
    return _sum_of_parts(dbias, a.bias, empty), _sum_of_parts(dhead_scale, a.head_scale, empty)


def attention_weights(a: Inputs) -> tuple[Tensor, Tensor]:
    """Mean over the heads of the dropped softmax weights, (B, L, S), and log-sum-exp (B, H, L)."""
    _, weights, lse = _with_weights(a, None)
    return weights, lse


def attention_with_weights(a: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output as of `attention`, averaged weights and log-sum-exp from one pass over the scores."""
    B, H, L, D = a.q.shape
    return _with_weights(a, a.q.new_empty(B, L, H, D).transpose(1, 2))


def _with_weights(a: Inputs, o: Tensor | None):
    q, k, v, *options = _arguments(a)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    weights = q.new_empty(q.shape[0], q.shape[2], k.shape[2])
    values = None if o is None else v
    torch.ops.lsmha_fast_C.attention_weights.default(q, k, values, *options, o, lse, weights)
    return o, weights, lse


def attention_weights_backward(
    dweights: Tensor, a: Inputs, lse: Tensor, bias_grad: bool, dq: Tensor, dk: Tensor
) -> Tensor:
    """Write dq and dk in place; return dbias (empty where not asked for)."""
    q, k, _, key_mask, bias, _, *options = _arguments(a)
    dbias = _bias_parts(a, bias_grad)
    torch.ops.lsmha_fast_C.attention_weights_backward.default(
        dweights.contiguous(), q, k, key_mask, bias, *options, dq, dk, dbias
    )
    return _sum_of_parts(dbias, a.bias, a.q.new_empty(0))


def _bias_parts(a: Inputs, bias_grad: bool) -> Tensor | None:
    """Zeros to add up the bias gradient in, (parts, *bias.shape), where it was asked for."""
    if not bias_grad or a.bias is None:
        return None
    terms = a.q.shape[0] * a.q.shape[1] // (a.bias.shape[0] * a.bias.shape[1])
    return a.q.new_zeros(min(terms, BIAS_PARTS), *a.bias.shape, dtype=_accumulator(a.q))


def _sum_of_parts(parts: Tensor | None, like: Tensor | None, empty: Tensor) -> Tensor:
    return empty if parts is None or like is None else parts.sum(0).to(like.dtype)


def _arguments(a: Inputs) -> tuple:
    """What both operators take after the output's gradient."""
    acc, shape = _accumulator(a.q), (*a.q.shape[:3], a.k.shape[2])
    threshold, factor = dropout_rule(a.dropout_p) if a.seed is not None else (0, 1.0)
    return (
        *(_readable(t) for t in (a.q, a.k, a.v)),
        None if a.key_mask is None else a.key_mask.contiguous(),
        None if a.bias is None else a.bias.to(acc).expand(shape),
        None if a.head_scale is None else a.head_scale.to(acc).contiguous(),
        # 16 bits cannot say "drop all", the factor 0 does
        a.seed, min(threshold, 65535), factor, a.scale,
    )  # fmt: skip


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _readable(x: Tensor) -> Tensor:
    # the kernels take any strides but need dense channels
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
