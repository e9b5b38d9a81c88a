"""What every process of tests/train/test_ranks.py does; started by torchrun.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/train/ranks.py FOLDER TASK ...
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch
from tiny import TINY, load

from lsmha_fast.train import RunOptions, train, trainer
from lsmha_fast.train import run as run_module
from lsmha_fast.train.checkpoint import load_checkpoint

CONFIG = dataclasses.replace(
    TINY,
    dim=32,
    depth=2,
    num_heads=4,
    epochs=2,
    mixup=0.8,
    conv_blocks=1,
    drop_last=True,
    device="cpu",
)
# nothing random within the network, and images that do not depend on the number of processes
PLAIN = dataclasses.replace(CONFIG, attn_drop=0.0, drop_path=0.0, conv_blocks=0, pipeline="device")


def before_step(number, action):
    """Run `action` before the step of that number, counted over this process."""
    step, count = trainer.Trainer.train_step, iter(range(10_000))

    def wrapped(self, images, targets):
        if next(count) == number:
            action()
        return step(self, images, targets)

    trainer.Trainer.train_step = wrapped


def do(task, root):
    """One of the things to do, in a folder of `root` with its name."""
    folder = root / task
    if task == "plain":
        train(PLAIN, folder)
    elif task == "whole":
        train(CONFIG, folder)
    elif task == "cut":  # one rank alone gets the signal, both stop; then they go on
        step = trainer.Trainer.train_step
        if os.environ["RANK"] == "1":
            before_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = train(CONFIG, folder)
        trainer.Trainer.train_step = step
        assert result.stopped_by == signal.SIGTERM  # on both
        if os.environ["RANK"] == "0":
            state = load_checkpoint(folder)
            assert (state["epoch"], state["step"]) == (1, 1)
        train(CONFIG, folder, resume=True)
    elif task == "killed":  # and started again by torchrun
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            before_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))
        train(CONFIG, folder, options=RunOptions(save_seconds=0.0))


def main(root, *tasks):
    torch.set_num_threads(1)
    run_module.load_dataset = load
    if len(tasks) == 1:
        do(tasks[0], Path(root))
        return
    torch.distributed.init_process_group("gloo")
    for task in tasks:
        do(task, Path(root))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
