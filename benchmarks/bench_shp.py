"""SHP of all heads in one pass, against the ways to silence heads one by one.

cct_7_3x1_32 with 64 heads, 100 labels. Group "shp-from-heads": the heads of one block lie in
memory, wanted are the matrices of all its heads.

- ours: what `single_head_performance` does with them.
- loop_masked: for every head the definition: the channels of the other heads set to zero, pooled,
  classified, added up by label.
- loop_sliced: only the head's own channels are pooled and classified, which is what one writes
  after seeing that zeros need no multiplication.

Group "shp-whole": from images to the matrices of all heads of all blocks.

- features: one pass of the model alone, which is the floor.
- ours: `single_head_performance`.
- masked_model: for every block and head the whole model again, and the masked probe of the block.
  Timed for `TIMED` heads and multiplied up (`seconds_for_all_heads`): half an hour otherwise.

LSMHA_BENCH_FULL=1 measures loop_masked and masked_model on a CPU, too.
"""

import os

import pytest
import torch

from benchmarks.common import DEVICE, info, relative_error, sync_timer
from lsmha_fast import create_model
from lsmha_fast.analysis import BlockProbe, Probes, single_head_performance
from lsmha_fast.analysis._features import HeadBatch
from lsmha_fast.analysis.shp import HeadSums

K, H, N, D = 100, 64, 256, 4
TIMED = 2  # heads of masked_model
HEADS_IMAGES, MODEL_IMAGES, BATCH = 500, 64, 32
slow = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("LSMHA_BENCH_FULL") != "1",
    reason="minutes on a CPU; set LSMHA_BENCH_FULL=1",
)


def random_probes(depth):
    shapes = (H, D), (K, H, D), (K,)
    blocks = tuple(BlockProbe(*(0.5 * torch.randn(s) for s in shapes)) for _ in range(depth))
    return Probes(blocks, tuple(f"block {m + 1}" for m in range(depth)))


def masked_fields(x, h, pool, fc):
    """(B, K) with the channels of all other heads set to zero."""
    silenced = torch.zeros_like(x)
    silenced[:, :, h] = x[:, :, h]
    silenced = silenced.flatten(2)
    p = torch.softmax(silenced @ pool.flatten(), dim=1)
    return torch.einsum("bn,bnc->bc", p, silenced) @ fc.flatten(1).T


def sliced_fields(x, h, pool, fc):
    """(B, K) from the channels of one head."""
    alone = x[:, :, h]
    p = torch.softmax(alone @ pool[h], dim=1)
    return torch.einsum("bn,bnd->bd", p, alone) @ fc[:, h].T


def loop(fields_of):
    def run(x, labels, probes):
        pool, fc = (t.to(DEVICE) for t in probes.blocks[0][:2])
        sums = torch.zeros(H, K, K, device=DEVICE)
        for h in range(H):
            sums[h].index_add_(0, labels, fields_of(x, h, pool, fc))
        return sums / torch.bincount(labels, minlength=K)[:, None]

    return run


def from_heads(x, labels, probes):
    sums = HeadSums(probes, "head", False, None, x.device, None)
    sums.add(HeadBatch(x.new_zeros(len(x), K), (x,), labels))
    return sums.take().matrix(0)


FROM_HEADS = {
    "ours": from_heads,
    "loop_sliced": loop(sliced_fields),
    "loop_masked": loop(masked_fields),
}


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=slow if m == "loop_masked" else ()) for m in FROM_HEADS]
)
@pytest.mark.benchmark(group="shp-from-heads", timer=sync_timer)
def test_shp_from_heads(benchmark, method):
    torch.manual_seed(0)
    x = torch.randn(HEADS_IMAGES, N, H, D, device=DEVICE)
    setup = x, torch.arange(HEADS_IMAGES, device=DEVICE) % K, random_probes(1)
    rounds = {"rounds": 7, "warmup_rounds": 1} if method == "ours" else {"rounds": 1}
    result = benchmark.pedantic(FROM_HEADS[method], setup, **rounds)
    error = relative_error(from_heads(*setup).to(DEVICE), result)
    assert error < 1e-4, "the loop measures something else"
    info(benchmark, error=error, images=HEADS_IMAGES, heads=H, classes=K)


def features(model, probes, batches):
    with torch.no_grad():
        for images, _ in batches:
            model.forward_with_heads(images)


def masked_model(model, probes, batches):
    """`TIMED` heads of the last block, each with whole passes of the model."""
    pool, fc = (t.to(DEVICE) for t in probes.blocks[-1][:2])
    sums = torch.zeros(TIMED, K, K, device=DEVICE)
    with torch.no_grad():
        for h in range(TIMED):
            for images, labels in batches:
                x = model.forward_with_heads(images).heads[-1]
                sums[h].index_add_(0, labels, masked_fields(x, h, pool, fc))


WHOLE = {"features": features, "ours": single_head_performance, "masked_model": masked_model}


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=slow if m == "masked_model" else ()) for m in WHOLE]
)
@pytest.mark.benchmark(group="shp-whole", timer=sync_timer)
def test_shp_whole(benchmark, method):
    torch.manual_seed(0)
    model = create_model("cct_7_3x1_32", K, H).eval().to(DEVICE)
    depth = len(model.block_names)
    images = torch.randn(MODEL_IMAGES, 3, 32, 32, device=DEVICE)
    labels = torch.arange(MODEL_IMAGES, device=DEVICE) % K
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    setup = model, random_probes(depth), batches
    once = {"rounds": 1} if method == "masked_model" else {"rounds": 3, "warmup_rounds": 1}
    benchmark.pedantic(WHOLE[method], setup, **once)
    scale = depth * H / TIMED if method == "masked_model" else 1
    info(
        benchmark,
        images=MODEL_IMAGES,
        blocks=depth,
        heads=H,
        classes=K,
        seconds_for_all_heads=benchmark.stats["median"] * scale,
        scaled_from=f"{TIMED} heads" if scale > 1 else "all heads",
    )
