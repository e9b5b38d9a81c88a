"""LSMultiHeadAttention against nn.MultiheadAttention with the same weights, in the same run.

Self-attention with 256 channels, split into few or very many heads; `infer` is evaluation without
gradients, where PyTorch takes its fused path, `train` is forward and backward.
"""

import pytest
import torch
from torch import nn

from benchmarks.common import DEVICE, info, relative_error, sync_timer
from lsmha_fast import LSMultiHeadAttention

# (B, N, C, H)
SHAPES = {
    "cpu": [(4, 64, 256, H) for H in (4, 16, 64)] + [(2, 256, 256, H) for H in (4, 16, 64)],
    "cuda": [(256, 64, 256, 64), (256, 256, 256, 8), (256, 256, 256, 64), (256, 256, 256, 256)],
}[DEVICE]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
MODULES = {"torch": nn.MultiheadAttention, "ours": LSMultiHeadAttention}


def make(cls, C, H, dtype=DTYPE):
    torch.manual_seed(0)  # both classes draw the same weights
    return cls(C, H, batch_first=True, device=DEVICE, dtype=dtype)


def label(shape):
    return "B{}-N{}-C{}-H{}".format(*shape)


@pytest.mark.benchmark(group="modules", timer=sync_timer)
@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize("need_weights", [False, True], ids=["out", "weights"])
@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("method", MODULES)
def test_self_attention(benchmark, method, mode, need_weights, shape):
    B, N, C, H = shape
    module = make(MODULES[method], C, H).train(mode == "train")
    x = torch.randn(B, N, C, device=DEVICE, dtype=DTYPE, requires_grad=mode == "train")
    do = torch.randn_like(x)

    def step():
        with torch.set_grad_enabled(mode == "train"):
            out = module(x, x, x, need_weights=need_weights)[0]
        if mode == "train":
            out.backward(do)
        return out

    exact = make(nn.MultiheadAttention, C, H, torch.float64).eval()
    exact.load_state_dict(module.state_dict())
    with torch.no_grad():
        high = exact(*[x[:2].double()] * 3, need_weights=False)[0]
    scores, products = B * N * N * C, B * N * C * C
    info(
        benchmark,
        flops=2 * (2 * scores + 4 * products) * (3 if mode == "train" else 1),
        error=relative_error(step()[:2].detach(), high),
    )
    benchmark(step)
