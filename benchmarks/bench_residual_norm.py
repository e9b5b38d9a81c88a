"""Residual, stochastic depth and LayerNorm: every backend against plain and compiled PyTorch.

`published` is the block's second norm (post_norm, its result is used by the MLP and by the stream),
`standard` returns the sum beside it, `first` has no branch. `autocast` has an fp32 stream, a branch
and a result in bf16.
"""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.common import DEVICE, info, relative_error, sync_timer
from lsmha_fast._ext import ext_missing
from lsmha_fast.ops import residual_norm

SHAPES = {"cpu": [(16, 256, 256)], "cuda": [(16, 256, 256), (512, 256, 256)]}[DEVICE]
FORMS = ("published", "standard", "first")
FP32, BF16 = torch.float32, torch.bfloat16
# dtypes of x, branch and y
TYPES = {
    "float32": (FP32, FP32, FP32),
    "bfloat16": (BF16, BF16, BF16),
    "autocast": (FP32, BF16, BF16),
}
DROP_PATH = 0.1


def eager(x, branch, weight, bias, *, keep, post_norm, dtype):
    """What one writes without a kernel."""
    s = x
    if branch is not None:
        s = x + branch * keep.to(branch.dtype)[:, None, None]
    y = F.layer_norm(s, s.shape[-1:], weight.to(s.dtype), bias.to(s.dtype))
    return (y if post_norm else s), y.to(dtype)


def ours(backend):
    return lambda *args, **options: residual_norm(*args, backend=backend, **options)


METHODS = {
    "eager": lambda: eager,
    "compile": lambda: torch.compile(eager, dynamic=False),
    "reference": lambda: ours("reference"),
    "cpp": lambda: ours("cpp"),
    "triton": lambda: ours("triton"),
    "ours": lambda: ours(None),
}
MARKS = {
    "cpp": pytest.mark.skipif(
        DEVICE != "cpu" or ext_missing() is not None, reason=ext_missing() or "needs CPU tensors"
    ),
    "triton": pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device"),
}
cases = [
    pytest.mark.parametrize("method", [pytest.param(m, marks=MARKS.get(m, ())) for m in METHODS]),
    pytest.mark.parametrize("form", FORMS),
    pytest.mark.parametrize("types", TYPES),
    pytest.mark.parametrize("shape", SHAPES, ids=str),
]


def all_cases(test):
    for mark in cases:
        test = mark(test)
    return test


def inputs(shape, types, form):
    """Arguments, options, the gradients of stream and y."""
    torch.manual_seed(0)
    x_dtype, branch_dtype, dtype = TYPES[types]
    x = torch.randn(shape, device=DEVICE, dtype=x_dtype)
    branch = torch.randn(shape, device=DEVICE, dtype=branch_dtype) if form != "first" else None
    weight, bias = torch.ones(2, shape[-1], device=DEVICE).unbind()
    keep = (torch.rand(shape[0], device=DEVICE) >= DROP_PATH).float() / (1 - DROP_PATH)
    grads = [torch.randn(shape, device=DEVICE, dtype=t) for t in (x_dtype, dtype)]
    options = {"keep": None if branch is None else keep, "post_norm": form == "published"}
    return (x, branch, weight, bias), {**options, "dtype": dtype}, grads


def doubles(args, options):
    wide = [None if t is None else t.double() for t in args]
    return wide, {**options, "dtype": torch.float64}


def moved(args, outs, backward):
    """Least bytes: inputs and distinct outputs once; backward also their gradients, and x (or the
    sum, or branch and x) once more."""
    tensors = [t for t in args[:2] if t is not None]
    outputs = {t.data_ptr(): t for t in outs if t.data_ptr() != args[0].data_ptr()}.values()
    forward = sum(t.nbytes for t in (*tensors, *outputs))
    gradients = sum(t.nbytes for t in (*tensors, *outs))
    return forward + backward * (gradients + sum(t.nbytes for t in tensors))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@all_cases
@pytest.mark.benchmark(group="residual-norm-fwd", timer=sync_timer, max_time=0.3)
def test_forward(benchmark, method, form, types, shape):
    args, options, _ = inputs(shape, types, form)
    call = METHODS[method]()
    with torch.no_grad():
        outs = call(*args, **options)
        benchmark(call, *args, **options)
        wide, exact = doubles(args, options)
        high = eager(*wide, **exact)[1]
    info(benchmark, bytes=moved(args, outs, False), error=relative_error(outs[1], high))


def step(call, args, options, grads):
    """Forward and the gradients of all arguments."""
    args = [t if t is None else t.detach().requires_grad_() for t in args]
    outs = call(*args, **options)
    return outs, torch.autograd.grad(outs, [t for t in args if t is not None], grads)


@all_cases
@pytest.mark.benchmark(group="residual-norm-fwd-bwd", timer=sync_timer, max_time=0.3)
def test_forward_backward(benchmark, method, form, types, shape):
    args, options, grads = inputs(shape, types, form)
    call = METHODS[method]()
    outs, found = step(call, args, options, grads)
    benchmark(step, call, args, options, grads)
    wide, exact = doubles(args, options)
    _, high = step(eager, wide, exact, [g.double() for g in grads])
    info(benchmark, bytes=moved(args, outs, True), error=relative_error(found[0], high[0]))
