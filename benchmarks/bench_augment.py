"""A training batch of each pipeline, and beside it the training step it is for.

On a CPU everything runs on one thread, so `images_per_s` is per core.
"""

import functools

import pytest
import torch
from torch.nn import functional as F

from benchmarks.common import DEVICE, info, sync_timer
from lsmha_fast import create_model, data
from lsmha_fast._ext import ext_missing
from lsmha_fast.data.draws import draw_plan
from lsmha_fast.ops import augment

BATCH = {"cpu": 128, "cuda": 512}[DEVICE]
BACKENDS = {"cpu": ["reference", "cpp"], "cuda": ["reference", "triton"]}[DEVICE]
MARKS = {"cpp": pytest.mark.skipif(ext_missing() is not None, reason=str(ext_missing()))}


@pytest.fixture(autouse=True)
def _one_core():
    before = torch.get_num_threads()
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def glyphs():
    """Generated glyphs of the hard tier, 2 048 of them."""
    return data.load_dataset("glyphs100", "train", tier="hard", size=2048)


def endless(batches):
    """Batch after batch, epoch after epoch."""
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1


@pytest.mark.parametrize("pipeline", data.PIPELINES)
@pytest.mark.benchmark(group="augment: pipeline", timer=sync_timer)
def test_pipeline(benchmark, pipeline):
    batches = data.make_batches(
        glyphs(),
        batch_size=BATCH,
        pipeline=pipeline,
        config=data.AugmentConfig(),
        device=DEVICE,
        dtype=torch.float32 if DEVICE == "cpu" else torch.bfloat16,
    )
    iterator = endless(batches)
    benchmark.pedantic(next, (iterator,), rounds=8, iterations=2, warmup_rounds=1)
    report(benchmark, pipeline=pipeline)


@pytest.mark.parametrize("backend", [pytest.param(b, marks=MARKS.get(b, ())) for b in BACKENDS])
@pytest.mark.benchmark(group="augment: crop and RandAugment", timer=sync_timer)
def test_backend(benchmark, backend):
    pixels = glyphs().images.to(DEVICE)
    index = torch.arange(BATCH)
    plan = draw_plan(data.AugmentConfig(), 0, 0, index, 32, 32)
    arguments = [t.to(DEVICE) for t in (index, plan.crops, plan.layers)]
    once = functools.partial(augment, pixels, *arguments, [129, 124, 112], backend=backend)
    benchmark.pedantic(once, rounds=5, iterations=2, warmup_rounds=1)
    report(benchmark, bytes=2 * BATCH * 3072)


@pytest.mark.benchmark(group="augment: draws", timer=sync_timer)
def test_draws(benchmark):
    """Random numbers of a batch, on the host."""
    benchmark.pedantic(
        draw_plan, (data.AugmentConfig(), 0, 0, torch.arange(BATCH), 32, 32), rounds=5, iterations=2
    )
    report(benchmark)


@pytest.mark.benchmark(group="augment: training step", timer=sync_timer)
def test_training_step(benchmark):
    """cct_7_3x1_32 with 64 heads, forward and backward: what a batch is for."""
    size = 8 if DEVICE == "cpu" else BATCH
    model = create_model("cct_7_3x1_32", 100, num_heads=64).to(DEVICE)
    x = torch.randn(size, 3, 32, 32, device=DEVICE)
    targets = torch.randint(100, (size,), device=DEVICE)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = F.cross_entropy(model(x).float(), targets)
        loss.backward()

    benchmark.pedantic(step, rounds=2, warmup_rounds=1)
    report(benchmark, size)


def report(benchmark, size=None, **facts):
    size = size or BATCH
    rate = size / benchmark.stats.stats.median if benchmark.stats else None
    info(benchmark, images_per_s=rate, batch=size, **facts)
