"""The attention ops in standard operators, for exporters that know no other (ONNX, AOTInductor)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._dispatch import overloads


def attention_decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """A table for `torch.export.ExportedProgram.run_decompositions`, for inference.

    `torch.onnx.export(program.run_decompositions(attention_decompositions()), ...)` needs no
    translation of its own; scores are then held in memory, as every standard attention does.

    Returns:
        Operator -> its formula in standard operators.
    """
    ops = torch.ops.lsmha_fast
    return {
        **overloads(ops.attention, _attention),
        **overloads(ops.attention_packed, _packed),
        **overloads(ops.attention_weights, _weights),
        **overloads(ops.attention_with_weights, _with_weights),
    }


def _attention(q, k, v, *args):
    o, _, lse = _attend(q, k, v, *args)
    return o, lse


def _attend(q, k, v, key_mask, bias, head_scale, seed, dropout_p, scale, backend):
    """Output, weights of every head, and log-sum-exp."""
    p, lse = _softmax(q, k, key_mask, bias, seed, dropout_p, scale)
    o = p.to(q.dtype) @ v
    if head_scale is not None:
        o = o * head_scale.to(o.dtype)[:, None, None]
    return o.transpose(1, 2).contiguous().transpose(1, 2), p, lse


def _with_weights(q, k, v, *args):
    o, p, lse = _attend(q, k, v, *args)
    return o, p.mean(1).to(q.dtype), lse


def _packed(qkv, *options):
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    o, lse = _attention(q, k, v, *options)
    return o.transpose(1, 2).contiguous(), lse


def _weights(q, k, *args):
    *options, _backend = args
    p, lse = _softmax(q, k, *options)
    return p.mean(1).to(q.dtype), lse


def _softmax(
    q: Tensor, k: Tensor, key_mask, bias, seed, dropout_p: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Weights (B, H, L, S), zeros where a row has no keys, and log-sum-exp (B, H, L)."""
    if seed is not None:
        raise ValueError(
            f"attention has no standard form with dropout ({dropout_p}); export after model.eval()"
        )
    logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    largest = logits.amax(-1, keepdim=True)
    weights = torch.exp(logits - largest.masked_fill(largest == float("-inf"), 0.0))
    total = weights.sum(-1, keepdim=True)
    lse = (largest + torch.log(total)).squeeze(-1)
    return weights / total.masked_fill(total == 0, 1.0), lse
