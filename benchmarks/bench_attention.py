"""Attention with many small heads, against materialised scores and PyTorch's fused kernels.

Shapes are those of a CCT block with 256 channels, split into 8 heads of 32 up to 256 heads of 1.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import DEVICE, info, relative_error, sync_timer
from lsmha_fast._ext import cuda_ext_missing, ext_missing
from lsmha_fast.ops import attention, attention_packed
from lsmha_fast.ops.attention.op import CHECKS

# the case of the paper: as many heads as a small label set, trained with attention dropout
MAIN = {"cpu": (4, 64, 64, 4), "cuda": (256, 256, 64, 4)}[DEVICE]
# (B, N, H, D)
SHAPES = {
    "cpu": [
        MAIN,
        (1, 256, 256, 1),
        (1, 256, 128, 2),
        (1, 256, 64, 4),
        (1, 256, 32, 8),
        (2, 256, 16, 16),
        (2, 256, 8, 32),
    ],
    "cuda": [MAIN, *((256, 256, 256 // D, D) for D in (32, 16, 8, 2, 1)), (256, 64, 64, 4)],
}[DEVICE]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CASES = [(MAIN, 0.1), *((shape, 0.0) for shape in SHAPES)]
# head dims that the library's kernels ask for: without it cuDNN refuses and flash pads by itself
PADDED = 8


def eager(q, k, v, dropout_p):
    """Scores in memory, as the published CCT code has it."""
    p = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
    return F.dropout(p, dropout_p) @ v


def sdpa(backend=None, pad=False):
    def run(q, k, v, dropout_p):
        D = q.shape[-1]
        if pad and D % PADDED:
            q, k, v = (F.pad(t, (0, PADDED - D % PADDED)) for t in (q, k, v))
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=D**-0.5)
        return o[..., :D]

    return run


def ours(backend):
    return lambda q, k, v, dropout_p: attention(q, k, v, dropout_p=dropout_p, backend=backend)


METHODS = {
    "eager": lambda: eager,
    "compile": lambda: torch.compile(eager, dynamic=False),
    "sdpa": sdpa,
    "reference": lambda: ours("reference"),
    "ours-sdpa": lambda: ours("sdpa"),
    "ours": lambda: ours(None),
}
if DEVICE == "cpu" and ext_missing() is None:
    METHODS["ours-cpp"] = lambda: ours("cpp")
if DEVICE == "cuda":
    METHODS["ours-triton"] = lambda: ours("triton")
    if cuda_ext_missing() is None:
        METHODS["ours-cuda"] = lambda: ours("cuda")
    METHODS["sdpa-padded"] = lambda: sdpa(pad=True)
    for name in ("CUDNN", "FLASH", "EFFICIENT"):
        kernel = getattr(SDPBackend, f"{name}_ATTENTION")
        METHODS[f"sdpa-{name.lower()}-padded"] = lambda kernel=kernel: sdpa(kernel, pad=True)


def make_qkv(B, N, H, D):
    return torch.randn(B, N, 3, H, D, device=DEVICE, dtype=DTYPE)


def unpack(qkv):
    return [t.transpose(1, 2) for t in qkv.unbind(2)]


def facts(benchmark, shape, backward, error):
    B, N, H, D = shape
    scores = B * H * N * N
    tensor = B * N * H * D * DTYPE.itemsize
    info(
        benchmark,
        # two products forward, five backward
        flops=2 * scores * D * (7 if backward else 2),
        # forward q, k, v, o; backward o, do, q, k, v, dq, dk, dv; lse once each
        bytes=tensor * (12 if backward else 4) + B * H * N * 4 * (2 if backward else 1),
        exps=scores * (2 if backward else 1),
        error=error,
    )


def fp64_error(run, qkv, grad=None):
    """Of the output, or of the gradient of qkv, on the first images (fp64 scores are large)."""
    qkv = qkv[:2].detach().requires_grad_()
    results = []
    for call, x in ((run, qkv), (eager, qkv.detach().double().requires_grad_())):
        o = call(*unpack(x), 0.0)
        if grad is None:
            results.append(o.detach())
        else:
            results += torch.autograd.grad(o, x, grad[:2].to(o.dtype))
    return relative_error(*results)


def first_call(method, shape, call):
    """Compile, and skip what cannot run: a kernel that refuses a shape says so by an error."""
    if method == "compile" and shape != MAIN:
        pytest.skip("one compiled shape is enough")
    torch.compiler.reset()
    try:
        call()
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])


def label(value):
    return "B{}-N{}-H{}-D{}".format(*value) if isinstance(value, tuple) else f"p{value}"


@pytest.mark.benchmark(group="attention-fwd", timer=sync_timer)
@pytest.mark.parametrize("shape, dropout_p", CASES, ids=label)
@pytest.mark.parametrize("method", METHODS)
def test_forward(benchmark, method, shape, dropout_p):
    run, qkv = METHODS[method](), make_qkv(*shape)
    inputs = unpack(qkv)
    with torch.no_grad():
        first_call(method, shape, lambda: run(*inputs, dropout_p))
        facts(benchmark, shape, False, None if method == "compile" else fp64_error(run, qkv))
        benchmark(run, *inputs, dropout_p)


@pytest.mark.benchmark(group="attention-fwd-bwd", timer=sync_timer)
@pytest.mark.parametrize("shape, dropout_p", CASES, ids=label)
@pytest.mark.parametrize("method", METHODS)
def test_forward_and_backward(benchmark, method, shape, dropout_p):
    run, qkv = METHODS[method](), make_qkv(*shape).requires_grad_()
    B, N, H, D = shape
    do = torch.randn(B, N, H, D, device=DEVICE, dtype=DTYPE).transpose(1, 2)

    def step():
        return torch.autograd.grad(run(*unpack(qkv), dropout_p), qkv, do)

    first_call(method, shape, step)
    facts(benchmark, shape, True, None if method == "compile" else fp64_error(run, qkv, do))
    benchmark(step)


def packed(backend):
    return lambda qkv, dropout_p: attention_packed(qkv, dropout_p=dropout_p, backend=backend)


def packed_sdpa(qkv, dropout_p):
    """The usual way: views of the projection in, heads merged out."""
    return sdpa()(*unpack(qkv), dropout_p).transpose(1, 2).contiguous()


def runs_here(backend):
    if backend == "cuda":
        return DEVICE == "cuda" and cuda_ext_missing() is None
    if backend == "cpp":
        return DEVICE == "cpu" and ext_missing() is None
    return backend != "triton" or DEVICE == "cuda"


PACKED = {"sdpa": packed_sdpa, "ours": packed(None)} | {
    f"ours-{name}": packed(name) for name in CHECKS if runs_here(name)
}


@pytest.mark.benchmark(group="attention-packed", timer=sync_timer)
@pytest.mark.parametrize("shape, dropout_p", CASES[:2], ids=label)
@pytest.mark.parametrize("method", PACKED)
def test_packed_forward_and_backward(benchmark, method, shape, dropout_p):
    run, qkv = PACKED[method], make_qkv(*shape).requires_grad_()
    do = torch.randn_like(qkv[:, :, 0])

    def step():
        return torch.autograd.grad(run(qkv, dropout_p), qkv, do)

    first_call(method, shape, step)

    def unpacked(q, k, v, dropout_p):
        stacked = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2)
        return run(stacked, dropout_p).transpose(1, 2)

    facts(benchmark, shape, True, fp64_error(unpacked, qkv, do.transpose(1, 2)))
    benchmark(step)
