"""What `lsmha train` trains per second, augmentation included, and what its loop adds to a step.

"ours" is a session as the command runs it, with input, bar and flags, on a GPU with its step as one
CUDA graph; "input" is the time of its batches alone, "bare" the model without the loop. The others
train in the same session with other attention. On a GPU: bf16, batch 512. LSMHA_BENCH_FULL=1
measures batch 16 with 64 heads on a CPU, too.
"""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from benchmarks.bench_train_step import BATCH
from benchmarks.common import DEVICE, info, sync_timer
from lsmha_fast.data import ImageDataset
from lsmha_fast.deploy.published import with_published_attention
from lsmha_fast.train import RunOptions, TrainConfig
from lsmha_fast.train.loop import Session
from lsmha_fast.train.optim import autocast
from lsmha_fast.train.run import build_model
from lsmha_fast.train.signals import StopFlag
from lsmha_fast.train.trainer import Trainer

ON_GPU = DEVICE == "cuda"
STEPS = 8 if ON_GPU else 2
HEADS = (4, 16, 64, 128) if ON_GPU else (64,)
CONFIG = TrainConfig(
    data="glyphs100",
    model="cct_7_3x1_32",
    num_heads=64,
    batch_size=512 if ON_GPU else BATCH,
    epochs=10_000,
    mixup=0.8,
    erase=0.25,
)
# how a session differs: attention, and what the trainer makes of the step
SESSIONS = {
    "ours": {"graphed": ON_GPU},
    "ours-eager": {},
    "ours-compile": {"compiled": "default"},
    "compile-sdpa": {"compiled": "default", "backend": "sdpa"},
    "compile-published": {"compiled": "default", "backend": "published"},
    "published": {"backend": "published"},
}
CASES = [(m, h) for h in HEADS for m in ("ours", "bare", "input")]
if ON_GPU:  # a compilation takes the better part of a minute
    CASES += [(m, h) for h in HEADS for m in ("ours-eager", "compile-sdpa", "published")]
    CASES += [(m, 64) for m in ("ours-compile", "compile-published")]


def images_of(count):
    generator = torch.Generator().manual_seed(0)
    return ImageDataset(
        name="noise",
        images=torch.randint(0, 256, (count, 3, 32, 32), generator=generator).to(torch.uint8),
        labels=torch.arange(count) % 100,
        class_names=tuple(map(str, range(100))),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        generated=True,
    )


def make_trainer(heads, backend=None, **options):
    config = dataclasses.replace(
        CONFIG, num_heads=heads, backend=None if backend == "published" else backend
    )
    model = build_model(config, 100).to(DEVICE)
    if backend == "published":
        model = with_published_attention(model)
    data = images_of(STEPS * config.batch_size)
    trainer = Trainer(config, model, data, data, torch.device(DEVICE), **options)
    trainer.finish_epoch = lambda stop: dict(epoch=trainer.epoch)  # no evaluation
    trainer.forward.train()
    return trainer


def make_session(method, heads, folder):
    """A function that trains one epoch of STEPS steps as the command does."""
    trainer = make_trainer(heads, **SESSIONS[method])
    session = Session(trainer.config, folder, trainer, RunOptions(1e9), StopFlag(), print)

    def epoch():
        trainer.step = 0
        session.run_epoch()

    return epoch


def make(method, heads, folder):
    """A function that does STEPS steps of something."""
    if method in SESSIONS:
        return make_session(method, heads, folder)
    trainer = make_trainer(heads)
    if method == "input":
        return lambda: list(trainer.batches.epoch(0))
    batches = list(trainer.batches.epoch(0))

    def bare():
        for images, targets in batches:
            trainer.optimizer.zero_grad(set_to_none=True)
            with autocast(trainer.device, trainer.amp_dtype):
                loss = F.cross_entropy(trainer.forward(images).float(), targets)
            loss.backward()
            trainer.optimizer.step()

    return bare


@pytest.mark.benchmark(group="train-loop", timer=sync_timer, min_rounds=3, max_time=0.5)
@pytest.mark.parametrize(("method", "heads"), CASES, ids=lambda v: f"H{v}" if v in HEADS else v)
def test_train_loop(benchmark, method, heads, tmp_path):
    torch.compiler.reset()
    try:
        epoch = make(method, heads, tmp_path)
        for _ in range(2):  # kernels are compiled, and a graph is recorded after three steps
            epoch()
        benchmark(epoch)
    except torch.OutOfMemoryError:
        pytest.skip(f"{method} with {heads} heads does not fit into memory")
    info(benchmark, images_per_second=STEPS * CONFIG.batch_size / benchmark.stats["median"])
