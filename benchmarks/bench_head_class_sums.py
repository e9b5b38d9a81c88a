"""Class sums of all heads in one pass, against what people run: one masked pass per head."""

import functools

import pytest
import torch

from benchmarks.common import DEVICE, info, relative_error, sync_timer
from lsmha_fast._ext import ext_missing
from lsmha_fast.ops import head_class_sums

# (B, N, H, D); 100 classes
SHAPES = {
    "cpu": [(1000, 256, 64, 4)],
    "cuda": [(2000, 256, 16, 16), (2000, 256, 64, 4), (2000, 256, 256, 1)],
}
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16]}
NUM_CLASSES = 100


def einsum_then_add(x, weight, labels, classifier):
    """Pool all heads at once and add up by class; needs x twice and all token weights."""
    p = torch.softmax(torch.einsum("bnhd,hd->bnh", x, weight), dim=1)
    pooled = torch.einsum("bnh,bnhd->bhd", p, x).float()
    return pooled.new_zeros(NUM_CLASSES, *weight.shape).index_add_(0, labels, pooled)


def loop_over_heads(x, weight, labels, classifier):
    """For each head alone: pool, classify, average the fields by class."""
    matrices = []
    for h in range(x.shape[2]):
        p = torch.softmax((x[:, :, h] * weight[h]).sum(-1), dim=1)
        fields = torch.einsum("bn,bnd->bd", p, x[:, :, h]) @ classifier[:, h].T
        sums = fields.new_zeros(NUM_CLASSES, NUM_CLASSES).index_add_(0, labels, fields)
        matrices.append(sums)
    return torch.stack(matrices)


def ours(backend):
    """The op with its K x K x H field sums, so that it ends where the loop ends."""

    def run(x, weight, labels, classifier):
        sums = head_class_sums(x, weight, labels, NUM_CLASSES, backend=backend).sums
        return torch.einsum("chd,khd->hck", sums, classifier.to(sums.dtype))

    return run


def einsum_with_fields(x, weight, labels, classifier):
    sums = einsum_then_add(x, weight, labels, classifier)
    return torch.einsum("chd,khd->hck", sums, classifier.to(sums.dtype))


def read_once(x, weight, labels, classifier):
    """The floor: the time to read the tokens."""
    return x.sum()


METHODS = {
    "read": lambda: read_once,
    "loop": lambda: loop_over_heads,
    "einsum": lambda: einsum_with_fields,
    "compile": lambda: torch.compile(einsum_with_fields, dynamic=False),
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


@functools.cache
def inputs(shape, dtype):
    """Tokens, score weights, labels, classifier, and the fp64 result from the rounded inputs."""
    torch.manual_seed(0)
    B, N, H, D = shape
    x = torch.randn(shape, device=DEVICE, dtype=dtype)
    weight = torch.randn(H, D, device=DEVICE, dtype=dtype) * D**-0.5
    labels = torch.randint(NUM_CLASSES, (B,), device=DEVICE)
    classifier = torch.randn(NUM_CLASSES, H, D, device=DEVICE, dtype=dtype)
    high = ours("reference")(x.double(), weight.double(), labels, classifier.double())
    return (x, weight, labels, classifier), high


@pytest.mark.parametrize("shape", SHAPES[DEVICE], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[DEVICE], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("method", [pytest.param(m, marks=MARKS.get(m, ())) for m in METHODS])
@pytest.mark.benchmark(group="head-class-sums", timer=sync_timer)
def test_head_class_sums(benchmark, method, dtype, shape):
    torch.compiler.reset()
    arguments, high = inputs(shape, dtype)
    once = {"rounds": 1} if method == "loop" else {"rounds": 3, "warmup_rounds": 1}
    result = benchmark.pedantic(METHODS[method](), arguments, **once)
    B, N, H, D = shape
    info(
        benchmark,
        flops=4 * B * N * H * D + 2 * NUM_CLASSES**2 * H * D,
        bytes=B * N * H * D * dtype.itemsize + NUM_CLASSES**2 * H * 4,
        exps=B * N * H,
        error=None if method == "read" else relative_error(result, high),
    )
