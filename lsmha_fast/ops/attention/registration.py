"""Schemas, fake kernels and autograd of `attention` and `attention_packed`.

One schema serves every backend; the graph shows which one ran. Gradients that nobody asked for are
empty tensors, so that the number of outputs is fixed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._dispatch import call, impl, load_backend
from . import vmap
from .common import Inputs

# called by their overloads, whose choice would cost microseconds
OPS = torch.ops.lsmha_fast
OPTIONS = (
    "Tensor? key_mask, Tensor? bias, Tensor? head_scale, Tensor? seed, float dropout_p, float scale"
)
_SAVED = "Tensor o, Tensor lse, bool bias_grad"
for name, arguments, results in (
    ("attention", f"Tensor q, Tensor k, Tensor v, {OPTIONS}", "Tensor o, Tensor lse"),
    (
        "attention_backward",
        f"Tensor do, Tensor q, Tensor k, Tensor v, {OPTIONS}, {_SAVED}",
        "Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dhead_scale",
    ),
    ("attention_packed", f"Tensor qkv, {OPTIONS}", "Tensor o, Tensor lse"),
    (
        "attention_packed_backward",
        f"Tensor do, Tensor qkv, {OPTIONS}, {_SAVED}",
        "Tensor dqkv, Tensor dbias, Tensor dhead_scale",
    ),
):
    torch.library.define(f"lsmha_fast::{name}", f"({arguments}, str backend) -> ({results})")


def accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def heads_last(x: Tensor) -> Tensor:
    """New (B, H, N, D) tensor whose memory is (B, N, H, D), so that merging the heads is free."""
    B, H, N, D = x.shape
    return x.new_empty(B, N, H, D).transpose(1, 2)


def _unpack(qkv: Tensor) -> list[Tensor]:
    """(B, N, 3, H, D) -> views q, k, v of (B, H, N, D)."""
    return [t.transpose(1, 2) for t in qkv.unbind(2)]


def lse_like(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=accumulator(q))


def small_grads(like: Tensor, bias, head_scale, bias_grad) -> tuple[Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if bias_grad else like.new_empty(0)
    dhead_scale = like.new_empty(0) if head_scale is None else head_scale.new_empty(len(head_scale))
    return dbias, dhead_scale


def is_empty(a: Inputs) -> bool:
    return a.q.numel() == 0 or a.k.numel() == 0


def attend(a: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    if is_empty(a):
        return heads_last(a.q).zero_(), lse_like(a.q).fill_(-torch.inf)
    return load_backend(__package__, backend).attention(a)


def _attend_backward(do, a: Inputs, o, lse, bias_grad, backend, *buffers) -> tuple[Tensor, Tensor]:
    """Fill the buffers (dq, dk, dv); return dbias and dhead_scale."""
    if is_empty(a):
        for buffer in buffers:
            buffer.zero_()
        dbias, dhead_scale = small_grads(a.q, a.bias, a.head_scale, bias_grad)
        return dbias.zero_(), dhead_scale.zero_()
    run = load_backend(__package__, backend).attention_backward
    return run(do, a, o, lse, bias_grad, *buffers)


@impl("lsmha_fast::attention", native=True)
def _attention_impl(*args):
    *inputs, backend = args
    return attend(Inputs(*inputs), backend)


@torch.library.register_fake("lsmha_fast::attention")
def _attention_fake(q, *_):
    return heads_last(q), lse_like(q)


@impl("lsmha_fast::attention_backward", native=True)
def _attention_backward_impl(do, *args):
    *inputs, o, lse, bias_grad, backend = args
    a = Inputs(*inputs)
    buffers = [heads_last(t) for t in (a.q, a.k, a.v)]
    return *buffers, *_attend_backward(do, a, o, lse, bias_grad, backend, *buffers)


@torch.library.register_fake("lsmha_fast::attention_backward")
def _attention_backward_fake(do, *args):
    *inputs, _o, _lse, bias_grad, _backend = args
    a = Inputs(*inputs)
    small = small_grads(a.q, a.bias, a.head_scale, bias_grad)
    return *(heads_last(t) for t in (a.q, a.k, a.v)), *small


@impl("lsmha_fast::attention_packed", native=True)
def _packed_impl(qkv, *args):
    *options, backend = args
    o, lse = attend(Inputs(*_unpack(qkv), *options), backend)
    return o.transpose(1, 2), lse


@torch.library.register_fake("lsmha_fast::attention_packed")
def _packed_fake(qkv, *_):
    q = _unpack(qkv)[0]
    return heads_last(q).transpose(1, 2), lse_like(q)


@impl("lsmha_fast::attention_packed_backward", native=True)
def _packed_backward_impl(do, qkv, *args):
    *options, o, lse, bias_grad, backend = args
    a = Inputs(*_unpack(qkv), *options)
    dqkv = qkv.new_empty(qkv.shape)
    do, o = do.transpose(1, 2), o.transpose(1, 2)
    return dqkv, *_attend_backward(do, a, o, lse, bias_grad, backend, *_unpack(dqkv))


@torch.library.register_fake("lsmha_fast::attention_packed_backward")
def _packed_backward_fake(do, qkv, key_mask, bias, head_scale, *args):
    bias_grad = args[-2]
    return qkv.new_empty(qkv.shape), *small_grads(qkv, bias, head_scale, bias_grad)


def _save(ctx, inputs, output) -> None:
    """What the backward needs; `setup_context` keeps them open to torch.func."""
    *tensors, ctx.dropout_p, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


class Attention(torch.autograd.Function):
    """(q, k, v, key_mask, bias, head_scale, seed, dropout_p, scale, backend) -> o, lse.

    torch.compile counts the parameters of `forward`, so they are all named, here and below.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, key_mask, bias, head_scale, seed, dropout_p, scale, backend):
        return call(
            OPS.attention, q, k, v, key_mask, bias, head_scale, seed, dropout_p, scale, backend
        )

    setup_context = staticmethod(_save)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        *tensors, o, lse = ctx.saved_tensors
        bias_grad = ctx.needs_input_grad[4]
        dq, dk, dv, dbias, dhead_scale = call(
            OPS.attention_backward,
            do,
            *tensors,
            ctx.dropout_p,
            ctx.scale,
            o,
            lse,
            bias_grad,
            ctx.backend,
        )
        dhead_scale = dhead_scale if ctx.needs_input_grad[5] else None
        return dq, dk, dv, None, dbias if bias_grad else None, dhead_scale, None, None, None, None


class AttentionPacked(torch.autograd.Function):
    """(qkv, key_mask, bias, head_scale, seed, dropout_p, scale, backend) -> o, lse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(qkv, key_mask, bias, head_scale, seed, dropout_p, scale, backend):
        return call(
            OPS.attention_packed, qkv, key_mask, bias, head_scale, seed, dropout_p, scale, backend
        )

    setup_context = staticmethod(_save)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        *tensors, o, lse = ctx.saved_tensors
        bias_grad = ctx.needs_input_grad[2]
        dqkv, dbias, dhead_scale = call(
            OPS.attention_packed_backward,
            do,
            *tensors,
            ctx.dropout_p,
            ctx.scale,
            o,
            lse,
            bias_grad,
            ctx.backend,
        )
        dhead_scale = dhead_scale if ctx.needs_input_grad[3] else None
        return dqkv, None, dbias if bias_grad else None, dhead_scale, None, None, None, None


def run(function: type[torch.autograd.Function], *args):
    """`function.apply(*args)`, by the cheapest way that the caller's mode allows.

    PyTorch binds the arguments of a function with `setup_context` by its signature, which takes 20
    us: only torch.func and torch.compile need it. Where nothing can ask for a gradient, the forward
    alone is enough.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0:
        return _with_context(function).apply(*args)
    return function.forward(*args)


@functools.cache
def _with_context(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The function in the form whose `forward` takes the context; without its last output, the
    log-sum-exp, for which PyTorch would make a gradient of zeros."""

    def forward(ctx, *args):
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output[:-1]

    def backward(ctx, *grads):
        # what forbids a second derivative takes time, and is idle where nobody records one
        formula = function.backward if torch.is_grad_enabled() else function.backward.__wrapped__
        return formula(ctx, *grads, None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(function.__name__, (torch.autograd.Function,), methods)


for name in ("attention", "attention_packed"):
    vmap.register(name)
    vmap.register(f"{name}_backward")
