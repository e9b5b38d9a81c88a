"""Inputs and runs that the tests of attention share."""

from __future__ import annotations

import torch

from lsmha_fast.ops import attention
from lsmha_fast.testing import assert_no_worse

SEED = 7


def make_inputs(
    shape, dtype, *, masked=False, bias=None, head_scale=False, dropout_p=0.0, device="cpu"
):
    """Tensors of one call for `shape` = (B, H, L, S, D), rounded to `dtype`, held in fp64.

    The last image's keys are all masked and the first head's scale is 0: the corner cases ride
    along in every test that asks for a mask or a scale.
    """
    B, H, L, S, D = shape

    def normal(*size):
        return torch.randn(size, device=device).to(dtype).double()

    tensors = [normal(B, n, H, D).transpose(1, 2) for n in (L, S, S, L)]  # q, k, v, do
    options = {"dropout_p": dropout_p}
    if masked:
        options["key_mask"] = torch.rand(B, S, device=device) > 0.3
        options["key_mask"][-1] = False
    if bias is not None:
        options["bias"] = normal(*bias)
    if head_scale:
        options["head_scale"] = normal(H)
        options["head_scale"][0] = 0
    return tensors, options


def run(backend, dtype, tensors, options, function=attention):
    """Output and gradients (q, k, v or qkv, then bias and head_scale if given)."""
    *inputs, do = (t.to(dtype) for t in tensors)
    inputs = [t.detach().requires_grad_() for t in inputs]
    options = dict(options)
    for name in ("bias", "head_scale"):
        if name in options:
            options[name] = options[name].to(dtype).requires_grad_()
            inputs.append(options[name])
    torch.manual_seed(SEED)  # the same dropout in every backend
    positional = inputs[: len(tensors) - 1]
    o = function(*positional, backend=backend, **options)
    return o.detach(), *torch.autograd.grad(o, inputs, do)


def assert_backend_is_exact(backend, dtype, tensors, options, function=attention):
    """Outputs at most twice, gradients three times as far from fp64 as the reference in `dtype`."""
    actual = run(backend, dtype, tensors, options, function)
    low = run("reference", dtype, tensors, options, function)
    high = run("reference", torch.float64, tensors, options, function)
    for i, (a, l, h) in enumerate(zip(actual, low, high, strict=True)):
        assert_no_worse(a, l, h, factor=2 if i == 0 else 3)


def packed(tensors):
    """(q, k, v, do) of (B, H, N, D) -> (qkv, do) of (B, N, 3, H, D) and (B, N, H, D)."""
    q, k, v, do = (t.transpose(1, 2) for t in tensors)
    return [torch.stack((q, k, v), 2), do]
