"""Schemas, fake kernels and autograd of averaged weights, alone and with the heads' outputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._dispatch import call, impl, load_backend
from . import vmap
from .common import Inputs
from .registration import OPS, OPTIONS, attend, heads_last, is_empty, lse_like, small_grads

_OPTIONS = "Tensor? key_mask, Tensor? bias, Tensor? seed, float dropout_p, float scale"
for name, arguments, results in (
    ("attention_weights", f"Tensor q, Tensor k, {_OPTIONS}", "Tensor weights, Tensor lse"),
    (
        "attention_weights_backward",
        f"Tensor dweights, Tensor q, Tensor k, {_OPTIONS}, Tensor lse, bool bias_grad",
        "Tensor dq, Tensor dk, Tensor dbias",
    ),
    (
        "attention_with_weights",
        f"Tensor q, Tensor k, Tensor v, {OPTIONS}",
        "Tensor o, Tensor weights, Tensor lse",
    ),
):
    torch.library.define(f"lsmha_fast::{name}", f"({arguments}, str backend) -> ({results})")


def _inputs(q, k, key_mask, bias, seed, dropout_p, scale) -> Inputs:
    return Inputs(q, k, k, key_mask, bias, None, seed, dropout_p, scale)


def _weights_like(q: Tensor, k: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], k.shape[2])


@impl("lsmha_fast::attention_weights", native=True)
def _weights_impl(q, k, *args):
    *options, backend = args
    a = _inputs(q, k, *options)
    if is_empty(a):
        return _weights_like(q, k).zero_(), lse_like(q).fill_(-torch.inf)
    return load_backend(__package__, backend).attention_weights(a)


@torch.library.register_fake("lsmha_fast::attention_weights")
def _weights_fake(q, k, *_):
    return _weights_like(q, k), lse_like(q)


@impl("lsmha_fast::attention_weights_backward", native=True)
def _weights_backward_impl(dweights, q, k, *args):
    *options, lse, bias_grad, backend = args
    a = _inputs(q, k, *options)
    dq, dk = heads_last(q), heads_last(k)
    if is_empty(a):
        return dq.zero_(), dk.zero_(), small_grads(q, a.bias, None, bias_grad)[0].zero_()
    run = load_backend(__package__, backend).attention_weights_backward
    return dq, dk, run(dweights, a, lse, bias_grad, dq, dk)


@torch.library.register_fake("lsmha_fast::attention_weights_backward")
def _weights_backward_fake(dweights, q, k, key_mask, bias, *args):
    bias_grad = args[-2]
    return heads_last(q), heads_last(k), small_grads(q, bias, None, bias_grad)[0]


@impl("lsmha_fast::attention_with_weights", native=True)
def _with_weights_impl(*args):
    *inputs, backend = args
    a = Inputs(*inputs)
    if is_empty(a):
        o, lse = attend(a, backend)
        return o, _weights_like(a.q, a.k).zero_(), lse
    return load_backend(__package__, backend).attention_with_weights(a)


@torch.library.register_fake("lsmha_fast::attention_with_weights")
def _with_weights_fake(q, k, *_):
    return heads_last(q), _weights_like(q, k), lse_like(q)


class AttentionWeights(torch.autograd.Function):
    """(q, k, key_mask, bias, seed, dropout_p, scale, backend) -> weights, lse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, key_mask, bias, seed, dropout_p, scale, backend):
        return call(OPS.attention_weights, q, k, key_mask, bias, seed, dropout_p, scale, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.dropout_p, ctx.scale, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dweights, _):
        *tensors, lse = ctx.saved_tensors
        bias_grad = ctx.needs_input_grad[3]
        dq, dk, dbias = call(
            OPS.attention_weights_backward,
            dweights,
            *tensors,
            ctx.dropout_p,
            ctx.scale,
            lse,
            bias_grad,
            ctx.backend,
        )
        return dq, dk, None, dbias if bias_grad else None, None, None, None, None


class AttentionWithWeights(torch.autograd.Function):
    """(q, k, v, key_mask, bias, head_scale, seed, dropout_p, scale, backend) -> o, weights, lse.

    Its gradient is that of `Attention` plus that of `AttentionWeights`; a training step that only
    looks at the weights pays for the first alone.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, key_mask, bias, head_scale, seed, dropout_p, scale, backend):
        return call(
            OPS.attention_with_weights,
            q,
            k,
            v,
            key_mask,
            bias,
            head_scale,
            seed,
            dropout_p,
            scale,
            backend,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.dropout_p, ctx.scale, ctx.backend = inputs
        o, _, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, o, lse)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dweights, _):
        q, k, v, key_mask, bias, head_scale, seed, o, lse = ctx.saved_tensors
        bias_grad = ctx.needs_input_grad[4]
        dq = dk = dv = dbias = dhead_scale = None
        if do is not None:
            dq, dk, dv, dbias, dhead_scale = call(
                OPS.attention_backward, do, q, k, v, key_mask, bias, head_scale, seed,
                ctx.dropout_p, ctx.scale, o, lse, bias_grad, ctx.backend,
            )  # fmt: skip
        if dweights is not None:
            grads = call(
                OPS.attention_weights_backward, dweights, q, k, key_mask, bias, seed,
                ctx.dropout_p, ctx.scale, lse, bias_grad, ctx.backend,
            )  # fmt: skip
            if do is None:
                dq, dk, dbias = grads
            else:
                dq, dk, dbias = (a + b for a, b in zip((dq, dk, dbias), grads, strict=True))
        dbias = dbias if bias_grad else None
        dhead_scale = dhead_scale if ctx.needs_input_grad[5] else None
        return dq, dk, dv, None, dbias, dhead_scale, None, None, None, None


for name in ("attention_weights", "attention_weights_backward", "attention_with_weights"):
    vmap.register(name)
