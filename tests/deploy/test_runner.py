"""Runner: any batch, many threads, flat memory."""

import gc
import threading
from pathlib import Path

import pytest
import torch

from benchmarks.soak import resident_bytes
from lsmha_fast import create_model
from lsmha_fast.deploy import Runner, optimize

IMAGES = torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8)
HALVES = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def make_runner(device="cpu", max_batch=8):
    torch.manual_seed(0)
    model = create_model("cct_2_3x2_16", 10, num_heads=16, dim=32)
    return Runner(optimize(model, IMAGES[:1].to(device), **HALVES), max_batch)


def test_batches_up_to_the_maximum():
    runner = make_runner()
    alone = torch.cat([runner(image[None]) for image in IMAGES[:8]])
    for n in (1, 3, 7, 8):
        torch.testing.assert_close(runner(IMAGES[:n]), alone[:n])


def test_concurrent_callers_get_the_same_bits():
    runner = make_runner()
    batches = [IMAGES[i : i + 1 + i % 8] for i in range(24)]
    expected = [runner(batch) for batch in batches]
    wrong, start = [], threading.Barrier(8)

    def call(first):
        start.wait()
        for i in range(first, first + 24):
            if not torch.equal(runner(batches[i % 24]), expected[i % 24]):
                wrong.append((first, i))

    threads = [threading.Thread(target=call, args=(3 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_memory_stays_flat():
    """docs/latency.md has the command for a million calls."""
    runner, growth = make_runner(), []
    before = 0
    for _ in range(5):
        for i in range(2000):
            runner(IMAGES[: 1 + i % 8])
        gc.collect()
        before, last = resident_bytes(), before
        growth.append(before - last)
    # other tests' threads and caches may grow once; a leak grows in every part: that of the
    # smallest tensor of a call, 10 logits, by 2000 * 64 bytes
    assert min(growth[1:]) < 64 * 1024, growth


def test_bad_input_is_one_clear_error():
    runner = make_runner()
    with pytest.raises(ValueError, match=r"1\.\.8.*\(9, 3, 16, 16\)"):
        runner(IMAGES[:9])
    with pytest.raises(ValueError, match=r"\(0, 3, 16, 16\)"):
        runner(IMAGES[:0])
    with pytest.raises(ValueError, match="uint8 images, got torch.float32"):
        runner(IMAGES[:1].float())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_runner(max_batch=0)
    with pytest.raises(ValueError, match="what optimize returns, got Linear"):
        Runner(torch.nn.Linear(1, 1), 1)


@pytest.mark.gpu
def test_graphs_on_a_gpu():
    runner, on_cpu = make_runner("cuda"), make_runner()
    for n in (1, 3, 8):
        torch.testing.assert_close(runner(IMAGES[:n]), on_cpu(IMAGES[:n]), rtol=1e-3, atol=1e-3)
