"""One training step (forward, backward, AdamW) of cct_7_3x1_32 against the published attention.

The published attention holds the softmax of all heads in memory, (B, H, N, N); it is put into the
same model, so that nothing else differs. Both train with the model's own dropout of the weights.
LSMHA_BENCH_FULL=1 measures batch 16 with 64, 16 and 4 heads on a CPU, too.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks.common import DEVICE, info, sync_timer
from lsmha_fast import create_model
from lsmha_fast.deploy.published import with_published_attention

FULL = DEVICE == "cuda" or os.environ.get("LSMHA_BENCH_FULL") == "1"
BATCH = (16 if DEVICE == "cpu" else 128) if FULL else 2
HEADS = (64, 16, 4) if FULL else (64,)
CLASSES = 100


def make_step(method, heads, batch):
    """A function that trains one batch."""
    torch.manual_seed(0)
    model = create_model("cct_7_3x1_32", CLASSES, num_heads=heads).to(DEVICE)
    if method == "published":
        model = with_published_attention(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(batch, 3, 32, 32, device=DEVICE)
    labels = torch.randint(CLASSES, (batch,), device=DEVICE)

    def step():
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def peak_of_process():
    """Most bytes in memory since this program started; getrusage would count its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def measure_memory(method, heads, batch):
    """Bytes that two steps take beyond model and images, in this process."""
    step = make_step(method, int(heads), int(batch))
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = peak_of_process()
    step()
    step()
    return (torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak_of_process()) - before


def memory(method, heads, batch):
    """`measure_memory` in a process of its own: a process never forgets its peak."""
    code = (
        "import json, sys; from benchmarks.bench_train_step import measure_memory;"
        "print(json.dumps(measure_memory(*sys.argv[1:])))"
    )
    command = [sys.executable, "-c", code, method, str(heads), str(batch)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.benchmark(group="train-step", timer=sync_timer, min_rounds=3, max_time=0.5)
@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"H{h}")
@pytest.mark.parametrize("method", ["published", "ours"])
def test_train_step(benchmark, method, heads):
    step = make_step(method, heads, BATCH)
    step()
    benchmark(step)
    info(
        benchmark,
        images_per_second=BATCH / benchmark.stats["median"],
        step_bytes=memory(method, heads, BATCH),
    )
