"""Linear maps of a block: PyTorch's product against `nn.Linear` of this package, CPU, fp32.

Where both take the same route (other processors, few rows) the two are equal.
"""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.common import DEVICE, info, relative_error, sync_timer
from lsmha_fast.nn.linear import linear

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="GPUs have one library for both")

# rows, in, out: batch 2 and 16 of cct_7_3x1_32, its three products; one too small to gain
SHAPES = [(64, 256, 256), (512, 256, 512), (4096, 256, 768), (4096, 256, 512), (4096, 512, 256)]
METHODS = {"linear": F.linear, "ours": linear}
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
methods = pytest.mark.parametrize("method", METHODS)


def inputs(shape):
    torch.manual_seed(0)
    rows, inside, outside = shape
    x, weight = torch.randn(rows, inside), torch.randn(outside, inside) * inside**-0.5
    return x, weight, torch.randn(outside), torch.randn(rows, outside)


@shapes
@methods
@pytest.mark.benchmark(group="linear-fwd", timer=sync_timer, max_time=0.2)
def test_forward(benchmark, method, shape):
    x, weight, bias, _ = inputs(shape)
    with torch.no_grad():
        out = METHODS[method](x, weight, bias)
        benchmark(METHODS[method], x, weight, bias)
    rows, inside, outside = shape
    info(
        benchmark,
        flops=2 * rows * inside * outside,
        bytes=4 * (x.numel() + weight.numel() + out.numel()),
        error=relative_error(out, F.linear(x.double(), weight.double(), bias.double())),
    )


@shapes
@methods
@pytest.mark.benchmark(group="linear-fwd-bwd", timer=sync_timer, max_time=0.2)
def test_forward_backward(benchmark, method, shape):
    *tensors, dy = inputs(shape)
    tensors = [t.requires_grad_() for t in tensors]

    def step(function, tensors, dy):
        return torch.autograd.grad(function(*tensors), tensors, dy)

    _, dweight, _ = step(METHODS[method], tensors, dy)
    benchmark(step, METHODS[method], tensors, dy)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    _, high, _ = step(F.linear, doubles, dy.double())
    rows, inside, outside = shape
    info(
        benchmark,
        flops=6 * rows * inside * outside,
        bytes=4 * (3 * rows * (inside + outside) + 3 * inside * outside),
        error=relative_error(dweight, high),
    )
