"""What the training loop adds to a step: the same model, bare, in `train_step`, in a whole session.

"ours" is a session as `lsmha train` runs it, with input, bar and flags; "input" the time of its
batches alone. LSMHA_BENCH_FULL=1 measures batch 16 with 64 heads on a CPU, too.
"""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from benchmarks.bench_train_step import BATCH
from benchmarks.common import DEVICE, info, sync_timer
from lsmha_fast.data import ImageDataset
from lsmha_fast.train import RunOptions, TrainConfig
from lsmha_fast.train.loop import Session
from lsmha_fast.train.run import build_model
from lsmha_fast.train.signals import StopFlag
from lsmha_fast.train.trainer import Trainer

STEPS = 2
CONFIG = TrainConfig(
    data="glyphs100", model="cct_7_3x1_32", num_heads=64, batch_size=BATCH, mixup=0.8, erase=0.25
)


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


def make(method, folder):
    """A function that trains one epoch of STEPS steps, or makes its batches."""
    config = dataclasses.replace(CONFIG, epochs=10_000)
    device = torch.device(DEVICE)
    data = images_of(STEPS * BATCH)
    trainer = Trainer(config, build_model(config, 100).to(device), data, data, device)
    trainer.finish_epoch = lambda stop: dict(epoch=trainer.epoch)  # no evaluation
    batches = list(trainer.batches.epoch(0))
    trainer.forward.train()

    def bare():
        for images, targets in batches:
            trainer.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(trainer.forward(images).float(), targets).backward()
            trainer.optimizer.step()

    def train_step():
        for step, (images, targets) in enumerate(batches):
            trainer.step = step
            trainer.train_step(images, targets)

    def session():
        trainer.step = 0
        running.run_epoch()

    running = Session(config, folder, trainer, RunOptions(1e9), StopFlag(), print)
    choices = {"bare": bare, "train_step": train_step, "ours": session}
    return choices.get(method, lambda: list(trainer.batches.epoch(0)))


@pytest.mark.benchmark(group="train-loop", timer=sync_timer, min_rounds=3, max_time=0.5)
@pytest.mark.parametrize("method", ["bare", "train_step", "input", "ours"])
def test_train_loop(benchmark, method, tmp_path):
    epoch = make(method, tmp_path)
    epoch()
    benchmark(epoch)
    info(benchmark, images_per_second=STEPS * BATCH / benchmark.stats["median"])
