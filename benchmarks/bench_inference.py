"""One inference call of cct_7_3x1_32 and its hybrids: our form against the baselines.

On a CPU at batch 1 in float32 and bfloat16, the 64-head model also at batch 8; on a GPU in bfloat16
at batch 1 and 512, with `optimized` as CUDA graph through `deploy.Runner`, copies to and from the
host included. LSMHA_BENCH_FULL=1 adds batches 64 and 512 and the compiled variants on a CPU, which
take minutes. What would hold more than 8 GB of softmax weights is left out.
"""

import copy
import os

import pytest
import torch
from torch.nn import functional as F

from benchmarks.common import DEVICE, info, relative_error, sync_timer
from lsmha_fast import create_model
from lsmha_fast.deploy.fold import Affine
from lsmha_fast.deploy.layers import Dense, PackedDense, packing_missing
from lsmha_fast.deploy.variants import VARIANTS, Unavailable

FULL = DEVICE == "cuda" or os.environ.get("LSMHA_BENCH_FULL") == "1"
METHODS = [name for name in VARIANTS if FULL or "compiled" not in name]
MODELS = {
    "H64": {"num_heads": 64},
    "H16": {"num_heads": 16},
    "H4": {"num_heads": 4},
    "H64-conv2": {"num_heads": 64, "conv_blocks": 2},
    "H64-conv4": {"num_heads": 64, "conv_blocks": 4},
    "H64-separable4": {"num_heads": 64, "conv_blocks": 4, "conv_form": "separable"},
}


def cases():
    """Id -> model, batch, dtype."""
    if DEVICE == "cuda":
        return {f"{m}-B{b}": (m, b, torch.bfloat16) for m in MODELS for b in (1, 512)}
    found = {f"{model}-B1": (model, 1, torch.float32) for model in MODELS}
    found |= {f"{model}-B1-bfloat16": (model, 1, torch.bfloat16) for model in MODELS}
    batches = (8, 64, 512) if FULL else (8,)
    return found | {f"H64-B{batch}": ("H64", batch, torch.float32) for batch in batches}


@pytest.mark.benchmark(group="inference", timer=sync_timer, min_rounds=5, max_time=0.5)
@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("method", METHODS)
def test_inference(benchmark, method, case):
    model, batch, dtype = cases()[case]
    holds_weights = "published" in method or method == "onnxruntime"
    if DEVICE == "cpu" and holds_weights and 4 * batch * 64 * 256**2 > 8e9:
        pytest.skip("more than 8 GB of softmax weights at once")
    if DEVICE == "cuda" and "compiled" in method and model != "H64":
        pytest.skip("a compilation takes a minute")
    torch.manual_seed(0)
    torch.compiler.reset()
    net = create_model("cct_7_3x1_32", 100, **MODELS[model]).eval()
    images = torch.randn(batch, 3, 32, 32, device=DEVICE)
    try:
        call = VARIANTS[method](net, images, dtype)
    except Unavailable as reason:
        pytest.skip(str(reason))
    logits = call()
    if DEVICE == "cpu" and batch >= 64:  # seconds a call
        benchmark.pedantic(call, rounds=3, warmup_rounds=1)
    else:
        for _ in range(2):
            call()
        benchmark(call)
    few = images[:2].cpu().double()
    with torch.no_grad():
        high = copy.deepcopy(net).double()(few)
    info(
        benchmark,
        images_per_second=batch / benchmark.stats["median"],
        error=relative_error(logits[:2].cpu(), high[: len(logits)]),
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="weights are sorted on a CPU alone")
@pytest.mark.benchmark(group="inference-product", max_time=0.3)
@pytest.mark.parametrize("size", [(256, 768), (256, 256), (256, 512), (512, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("method", ["linear", "sorted"])
def test_product(benchmark, method, dtype, size):
    """One product of a block with the 256 tokens of one image."""
    if packing_missing(dtype) is not None:
        pytest.skip(packing_missing(dtype))
    torch.manual_seed(0)
    inputs, outputs = size
    x = torch.randn(256, inputs).to(dtype)
    weight = torch.randn(outputs, inputs, dtype=torch.float64) * inputs**-0.5
    dense = Dense(Affine(weight, torch.randn(outputs, dtype=torch.float64)), dtype)
    run = dense if method == "linear" else PackedDense(dense, len(x))
    with torch.inference_mode():
        out = run(x)
        benchmark(run, x)
    high = F.linear(x.double(), dense.weight.double(), dense.bias.double())
    info(benchmark, flops=2 * len(x) * inputs * outputs, error=relative_error(out, high))
