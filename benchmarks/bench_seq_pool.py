"""Sequence pooling: every backend against plain and compiled PyTorch."""

import pytest
import torch

from benchmarks.common import DEVICE, info, relative_error, sync_timer
from lsmha_fast._ext import ext_missing
from lsmha_fast.ops import seq_pool

# (B, N, H, D): CCT's pool, LS-MHA at 64 and 256 heads, single nodes
SHAPES = {
    "cpu": [(8, 256, 1, 256), (8, 256, 64, 4)],
    "cuda": [(512, 256, 1, 256), (512, 256, 16, 16), (512, 256, 64, 4), (512, 256, 256, 1)],
}
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16]}


def eager(x, weight):
    """What one writes without a kernel."""
    p = torch.softmax(torch.einsum("bnhd,hd->bnh", x, weight), dim=1)
    return torch.einsum("bnh,bnhd->bhd", p, x)


METHODS = {
    "eager": lambda: eager,
    "compile": lambda: torch.compile(eager, dynamic=False),
    "reference": lambda: lambda x, w: seq_pool(x, w, backend="reference"),
    "cpp": lambda: lambda x, w: seq_pool(x, w, backend="cpp"),
    "triton": lambda: lambda x, w: seq_pool(x, w, backend="triton"),
    "ours": lambda: seq_pool,
}
MARKS = {
    "cpp": pytest.mark.skipif(
        DEVICE != "cpu" or ext_missing() is not None, reason=ext_missing() or "needs CPU tensors"
    ),
    "triton": pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device"),
}
shapes = pytest.mark.parametrize("shape", SHAPES[DEVICE], ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES[DEVICE], ids=lambda d: str(d)[6:])
methods = pytest.mark.parametrize(
    "method", [pytest.param(m, marks=MARKS.get(m, ())) for m in METHODS]
)


def inputs(shape, dtype):
    torch.manual_seed(0)
    B, N, H, D = shape
    x = torch.randn(shape, device=DEVICE, dtype=dtype)
    weight = torch.randn(H, D, device=DEVICE, dtype=dtype) * D**-0.5
    return x, weight, torch.randn(B, H, D, device=DEVICE, dtype=dtype)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@shapes
@dtypes
@methods
@pytest.mark.benchmark(group="seq-pool-fwd", timer=sync_timer, max_time=0.3)
def test_forward(benchmark, method, dtype, shape):
    x, weight, _ = inputs(shape, dtype)
    pool = METHODS[method]()
    with torch.no_grad():
        out = pool(x, weight)
        benchmark(pool, x, weight)
    info(
        benchmark,
        flops=4 * x.numel(),
        bytes=(x.numel() + weight.numel() + out.numel()) * x.element_size(),
        exps=x.shape[0] * x.shape[1] * x.shape[2],
        error=relative_error(out, eager(x.double(), weight.double())),
    )


@shapes
@dtypes
@methods
@pytest.mark.benchmark(group="seq-pool-fwd-bwd", timer=sync_timer, max_time=0.3)
def test_forward_backward(benchmark, method, dtype, shape):
    x, weight, do = inputs(shape, dtype)
    pool = METHODS[method]()

    def step(x, weight, do):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        return torch.autograd.grad(pool(x, weight), (x, weight), do)

    dx, _ = step(x, weight, do)
    benchmark(step, x, weight, do)
    x64, weight64 = x.double().requires_grad_(), weight.double()
    (high,) = torch.autograd.grad(eager(x64, weight64), x64, do.double())
    small = 2 * weight.numel() + 2 * do.numel()
    info(
        benchmark,
        flops=16 * x.numel(),
        # the tokens are read forward and backward, their gradient is written
        bytes=(3 * x.numel() + small) * x.element_size(),
        exps=2 * x.shape[0] * x.shape[1] * x.shape[2],
        error=relative_error(dx, high),
    )
