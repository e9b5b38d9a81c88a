"""Sequence pooling per head: public function, schema, fake kernels, autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._ext import cpp_check
from .._dispatch import always, call, impl, load_backend, resolve_backend, triton_check

CHECKS = {
    "reference": always,
    "triton": lambda x: triton_check(x, (torch.float32, torch.float16, torch.bfloat16)),
    "cpp": lambda x: cpp_check(x, (torch.float32, torch.bfloat16)),
}

# by device, fastest first; Triton's interpreter is for tests that name it
ORDER = {"cuda": ("triton",), "cpu": ("cpp",)}

torch.library.define(
    "lsmha_fast::seq_pool", "(Tensor x, Tensor weight, str backend) -> (Tensor pooled, Tensor lse)"
)
torch.library.define(
    "lsmha_fast::seq_pool_backward",
    "(Tensor do, Tensor x, Tensor weight, Tensor pooled, Tensor lse, str backend)"
    " -> (Tensor dx, Tensor dweight)",
)


@impl("lsmha_fast::seq_pool", native=True)
def _forward_impl(x, weight, backend):
    return load_backend(__package__, backend).seq_pool(x, weight)


@impl("lsmha_fast::seq_pool_backward", native=True)
def _backward_impl(do, x, weight, pooled, lse, backend):
    return load_backend(__package__, backend).seq_pool_backward(do, x, weight, pooled, lse)


@torch.library.register_fake("lsmha_fast::seq_pool")
def _forward_fake(x, weight, backend):
    B, N, H, D = x.shape
    acc = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(B, H, D, dtype=acc), x.new_empty(B, H, dtype=acc)


@torch.library.register_fake("lsmha_fast::seq_pool_backward")
def _backward_fake(do, x, weight, pooled, lse, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


OPS = torch.ops.lsmha_fast


class _SeqPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, backend):
        pooled, lse = call(OPS.seq_pool, x, weight, backend)
        ctx.save_for_backward(x, weight, pooled, lse)
        ctx.backend = backend
        # torch.compile of 2.11 loses gradients where the result may be the saved tensor itself
        return pooled.to(x.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        return *call(OPS.seq_pool_backward, do, *ctx.saved_tensors, ctx.backend), None


def seq_pool(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """Softmax-weighted mean of the tokens, separately for every head.

    CCT's sequence pooling (arXiv 2104.05704, section 3.3) is the case H = 1; single-head
    performance pools every head by itself; single-nodal performance is D = 1.

    Args:
        x: tokens, (B, N, H, D), float; any strides. N >= 1.
        weight: score projection, (H, D).
        backend: "reference", "triton" or "cpp"; by default the fastest one for `x.device`.

    Returns:
        Pooled tokens, (B, H, D), in the dtype of `x`.

    Raises:
        ValueError: shapes do not fit, or the backend does not exist.
        RuntimeError: the named backend cannot run this call.
    """
    if x.ndim != 4 or weight.shape != x.shape[2:] or x.shape[1] == 0:
        raise ValueError(
            "seq_pool: expected x (B, N >= 1, H, D) and weight (H, D), "
            f"got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    order = ORDER.get(x.device.type, ())
    return _SeqPool.apply(x, weight, resolve_backend("seq_pool", backend, CHECKS, order, x))
