"""What stands around attention in inference: the fused ops against eager and compiled PyTorch.

On a GPU every method is captured in a CUDA graph of CALLS calls, as `deploy.Runner` replays it, so
that times are those of the device; `bytes` are those of the fused op, each tensor once.
"""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.common import DEVICE, info, relative_error, sync_timer
from lsmha_fast.ops import norm_linear, norm_pool_linear, project_mlp

# images of cct_7_3x1_32: 256 tokens of 256 channels
BATCHES = (1, 8, 64, 512) if DEVICE == "cuda" else (1,)
DTYPES = [torch.bfloat16, torch.float32] if DEVICE == "cuda" else [torch.float32]
N, C, HIDDEN, K = 256, 256, 512, 100
CALLS = 20 if DEVICE == "cuda" else 1


def plain_norm_linear(x, weight, bias):
    """What one writes without a kernel."""
    return F.linear(F.layer_norm(x, (C,)), weight, bias)


def plain_project_mlp(heads, x, proj, norm, fc1, fc2):
    x = F.layer_norm(x + F.linear(heads, *proj), (C,), *norm)
    return x + F.linear(F.gelu(F.linear(x, *fc1)), *fc2)


def plain_norm_pool_linear(x, scores, weight, bias):
    x = F.layer_norm(x, (C,))
    p = torch.softmax(x @ scores, 1)
    return F.linear((p[:, None] @ x)[:, 0], weight, bias).float()


OPS = {
    "norm-linear": (plain_norm_linear, norm_linear, {}),
    "project-mlp": (plain_project_mlp, project_mlp, {"normed_stream": True}),
    "norm-pool-linear": (plain_norm_pool_linear, norm_pool_linear, {}),
}
METHODS = ("eager", "compile", "reference", "triton", "ours")


def inputs(op, batch, dtype):
    """Arguments of an op, its operations and its bytes."""
    torch.manual_seed(0)

    def draw(*size, scale=1.0):
        return (torch.randn(size, device=DEVICE) * scale).to(dtype)

    def linear(out, inner):
        return draw(out, inner, scale=inner**-0.5), draw(out)

    x = draw(batch, N, C)
    if op == "norm-linear":
        args, flops, written = (x, *linear(3 * C, C)), 6 * x.numel() * C, 3 * x.numel()
    elif op == "project-mlp":
        norm = 1 + draw(C, scale=0.1), draw(C)
        args = draw(batch, N, C), x, linear(C, C), norm, linear(HIDDEN, C), linear(C, HIDDEN)
        flops, written = 2 * x.numel() * (C + 2 * HIDDEN), x.numel()
    else:
        args, flops, written = (x, draw(C, scale=C**-0.5), *linear(K, C)), 4 * x.numel(), batch * K
    return args, flops, (sum(t.numel() for t in flat(args)) + written) * x.element_size()


def flat(args):
    return [t for a in args for t in (a if isinstance(a, tuple) else (a,))]


def method_of(op, method):
    plain, fused, options = OPS[op]
    if method == "eager":
        return plain
    if method == "compile":
        return torch.compile(plain, mode="max-autotune-no-cudagraphs", dynamic=False)
    backend = None if method == "ours" else method
    return lambda *args: fused(*args, **options, backend=backend)


def captured(call):
    """CALLS calls as one graph on a GPU, else the call."""
    if DEVICE != "cuda":
        return call
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph.replay


@pytest.mark.benchmark(group="block", timer=sync_timer, max_time=0.3)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: f"B{b}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("method", METHODS)
def test_block(benchmark, method, dtype, batch, op):
    if DEVICE != "cuda" and method in ("compile", "triton"):
        pytest.skip("needs a CUDA device")
    torch.compiler.reset()
    args, flops, moved = inputs(op, batch, dtype)
    run = method_of(op, method)
    with torch.inference_mode():
        out = run(*args)
        high = OPS[op][0](*(
            tuple(t.double() for t in a) if isinstance(a, tuple) else a.double() for a in args
        ))  # fmt: skip
        benchmark(captured(lambda: run(*args)))
    info(
        benchmark,
        flops=CALLS * flops,
        bytes=CALLS * moved,
        error=relative_error(out, high),
        calls=CALLS,
    )
