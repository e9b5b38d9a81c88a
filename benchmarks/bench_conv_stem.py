"""One tokenizer layer: every backend against the three PyTorch calls, in both layouts, compiled."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.common import DEVICE, info, relative_error, sync_timer
from lsmha_fast._ext import ext_missing
from lsmha_fast.ops import conv_stem
from lsmha_fast.ops._dispatch import BackendError

# B, Cin, C, pixels, kernel, stride, padding: CCT-7/3x1, the second layer of 3x2, 7x2 at 224 pixels
SHAPES = {
    "cpu": [(1, 3, 256, 32, 3, 1, 1), (16, 3, 256, 32, 3, 1, 1), (32, 3, 64, 32, 3, 1, 1)],
    "cuda": [
        (1024, 3, 256, 32, 3, 1, 1),
        (1024, 64, 128, 16, 3, 1, 1),
        (256, 3, 64, 224, 7, 2, 3),
    ],
}
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def three_calls(x, weight, bias, stride, padding):
    y = F.max_pool2d(F.relu(F.conv2d(x, weight, bias, stride, padding)), 3, 2, 1)
    return y.flatten(2).transpose(1, 2).contiguous()


def channels_last(x, weight, bias, stride, padding):
    x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    return three_calls(x, weight, bias, stride, padding)


def ours(backend):
    def run(x, weight, bias, stride, padding):
        return conv_stem(x, weight, bias, stride=stride, padding=padding, backend=backend)

    return run


METHODS = {
    "eager": lambda: three_calls,
    "eager-channels-last": lambda: channels_last,
    "compile": lambda: torch.compile(channels_last, dynamic=False),
    "reference": lambda: ours("reference"),
    "triton": lambda: ours("triton"),
    "cuda": lambda: ours("cuda"),
    "cpp": lambda: ours("cpp"),
    "ours": lambda: ours(None),
}
MARKS = {
    "triton": pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device"),
    "cuda": pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device"),
    "cpp": pytest.mark.skipif(DEVICE != "cpu" or ext_missing() is not None, reason="needs a CPU"),
}
methods = pytest.mark.parametrize(
    "method", [pytest.param(m, marks=MARKS.get(m, ())) for m in METHODS]
)
shapes = pytest.mark.parametrize("shape", SHAPES[DEVICE], ids=str)


def inputs(shape):
    B, CIN, C, pixels, kernel = shape[:5]
    x = torch.randn(B, CIN, pixels, pixels, device=DEVICE, dtype=DTYPE)
    if CIN > 3:  # the tokens of a first layer
        x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(C, CIN, kernel, kernel, device=DEVICE, dtype=DTYPE)
    return x, weight * (CIN * kernel**2) ** -0.5, torch.randn(C, device=DEVICE, dtype=DTYPE)


def first_call(layer, *arguments):
    """Compile, and skip the shapes that a backend refuses."""
    try:
        return layer(*arguments)
    except BackendError as error:
        pytest.skip(str(error).splitlines()[0])


def conv_flops(shape):
    B, CIN, C, pixels, kernel, stride, padding = shape
    side = (pixels + 2 * padding - kernel) // stride + 1
    return 2 * B * C * side**2 * CIN * kernel**2


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    torch.manual_seed(0)


@shapes
@methods
@pytest.mark.benchmark(group="conv-stem-fwd", timer=sync_timer, max_time=0.3)
def test_forward(benchmark, method, shape):
    x, weight, bias = inputs(shape)
    layer = METHODS[method]()
    with torch.no_grad():
        out = first_call(layer, x, weight, bias, *shape[5:])
        benchmark(layer, x, weight, bias, *shape[5:])
        few = [t.double() for t in (x[:8], weight, bias)]
        high = three_calls(*few, *shape[5:])
    info(
        benchmark,
        flops=conv_flops(shape),
        bytes=size(x, weight, bias, out),
        error=relative_error(out[:8], high),
    )


@shapes
@methods
@pytest.mark.benchmark(group="conv-stem-fwd-bwd", timer=sync_timer, max_time=0.3)
def test_forward_backward(benchmark, method, shape):
    tensors = inputs(shape)
    # the images of a first layer want no gradient
    wanted = tensors if shape[1] > 3 else tensors[1:]
    for t in wanted:
        t.requires_grad_()
    layer = METHODS[method]()
    do = torch.randn_like(first_call(layer, *tensors, *shape[5:]))

    def step():
        return torch.autograd.grad(layer(*tensors, *shape[5:]), wanted, do)

    dweight = step()[-2]
    benchmark(step)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    (high,) = torch.autograd.grad(three_calls(*wide, *shape[5:]), wide[1], do.double())
    info(
        benchmark,
        flops=conv_flops(shape) * len(wanted),
        # forward; backward; and one byte per output that says which position won
        bytes=size(*tensors, do) + size(*tensors, do, *wanted) + 2 * do.numel(),
        error=relative_error(dweight, high),
    )
