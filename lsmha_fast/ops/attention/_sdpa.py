"""PyTorch's own fused attention: on the CPU its flash kernel, on CUDA FlashAttention-2.

The library kernels know no head scale; it multiplies v instead, which is the same product and keeps
the scale's gradient exact at zero. FlashAttention-2 sums dq with atomics, so its backward repeats
bit for bit only under `torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import Inputs

aten = torch.ops.aten


def attention(a: Inputs) -> tuple[Tensor, Tensor]:
    """Output (B, H, L, D) with the heads last in memory, and log-sum-exp (B, H, L)."""
    a = _dense(a)
    v = _scaled_v(a)
    if a.q.device.type == "cuda":
        o, lse, *_ = aten._scaled_dot_product_flash_attention(a.q, a.k, v, scale=a.scale)
    else:
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            a.q, a.k, v, attn_mask=_attn_mask(a), scale=a.scale
        )
    return o.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def attention_backward(
    do: Tensor,
    a: Inputs,
    o: Tensor,
    lse: Tensor,
    bias_grad: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write dq, dk and dv in place; return an empty dbias and dhead_scale (or empty)."""
    assert not bias_grad  # the check refuses a bias that needs a gradient
    a, do = _dense(a), _dense_last(do)
    v = _scaled_v(a)
    if a.q.device.type == "cuda":
        # the random state is only read when there is dropout
        state = torch.empty(2, dtype=torch.uint64, device=a.q.device)
        grads = aten._scaled_dot_product_flash_attention_backward(
            do, a.q, a.k, v, o, lse, None, None, a.q.shape[2], a.k.shape[2],
            0.0, False, state, state[:0], scale=a.scale,
        )  # fmt: skip
    else:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, a.q, a.k, v, o, lse, 0.0, False, attn_mask=_attn_mask(a), scale=a.scale
        )
    for buffer, grad in zip((dq, dk, dv), grads, strict=True):
        buffer.copy_(grad)
    dhead_scale = a.q.new_empty(0)
    if a.head_scale is not None:
        # by `sum`, which adds in pairs; a dot product of so many terms loses digits
        dhead_scale = (grads[2].to(lse.dtype) * a.v.to(lse.dtype)).sum((0, 2, 3))
        dhead_scale = dhead_scale.to(a.head_scale.dtype)
        dv *= a.head_scale.to(dv.dtype)[:, None, None]
    return a.q.new_empty(0), dhead_scale


def _dense(a: Inputs) -> Inputs:
    q, k, v = (_dense_last(t) for t in (a.q, a.k, a.v))
    return a._replace(q=q, k=k, v=v)


def _dense_last(t: Tensor) -> Tensor:
    """`t`, or a copy: the library kernels take the last dimension to be dense without a check."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _scaled_v(a: Inputs) -> Tensor:
    return a.v if a.head_scale is None else a.v * a.head_scale.to(a.v.dtype)[:, None, None]


def _attn_mask(a: Inputs) -> Tensor | None:
    """Key mask and bias as the one additive mask that the library takes."""
    if a.key_mask is None and a.bias is None:
        return None
    mask = a.q.new_zeros(1, 1, 1, 1) if a.bias is None else a.bias.to(a.q.dtype)
    if a.key_mask is not None:
        mask = mask.masked_fill(~a.key_mask[:, None, None, :], -torch.inf)
    L, S = a.q.shape[2], a.k.shape[2]
    return mask.expand(-1, -1, L, S)
