"""The heads' outputs with their averaged weights: one pass over the scores, two, or all in memory.

`eager` is what nn.MultiheadAttention computes for `need_weights=True`; `two passes` computes every
weight once for the output and once for the average. The gradient is that of both results.
"""

import pytest
import torch

from benchmarks.common import DEVICE, info, relative_error, sync_timer
from lsmha_fast.ops import attention, attention_weights, attention_with_weights

# (B, H, N, D)
SHAPES = {
    "cpu": [(4, 4, 64, 64), (4, 64, 64, 4), (2, 4, 256, 64), (2, 64, 256, 4)],
    "cuda": [(64, 64, 256, 4), (64, 4, 256, 64)],
}[DEVICE]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def eager(q, k, v):
    p = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
    return p @ v, p.mean(1)


METHODS = {
    "ours": attention_with_weights,
    "two passes": lambda q, k, v: (attention(q, k, v), attention_weights(q, k)),
    "eager": eager,
}


@pytest.mark.benchmark(group="attention_weights", timer=sync_timer)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-H{}-N{}-D{}".format(*s))
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_with_output(benchmark, method, gradient, shape):
    B, H, N, D = shape
    q, k, v = (
        torch.randn(B, N, H, D, device=DEVICE, dtype=DTYPE).transpose(1, 2) for _ in range(3)
    )
    leaves = [t.requires_grad_(gradient) for t in (q, k, v)]
    wanted = torch.randn_like(q), torch.randn(B, N, N, device=DEVICE, dtype=DTYPE)

    def step():
        results = METHODS[method](*leaves)
        return torch.autograd.grad(tuple(results), leaves, wanted) if gradient else results

    exact = eager(*(t.detach()[:1].double() for t in leaves))[1]
    with torch.no_grad():
        weights = METHODS[method](*(t[:1] for t in leaves))[1]
    scores = B * H * N * N
    info(
        benchmark,
        flops=2 * scores * 2 * D * (4 if gradient else 1),
        exps=scores * (2 if gradient else 1),
        error=relative_error(weights, exact),
    )
    benchmark(step)
