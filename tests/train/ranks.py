"""What every process of tests/train/test_ranks.py does; started by torchrun.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/train/ranks.py TASK FOLDER
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
# nothing random within the network, so that one process and two do the same
PLAIN = dataclasses.replace(CONFIG, attn_drop=0.0, drop_path=0.0, conv_blocks=0)


def before_step(number, action):
    """Run `action` before the step of that number, counted over this process."""
    step, count = trainer.Trainer.train_step, iter(range(10_000))

    def wrapped(self, images, targets):
        if next(count) == number:
            action()
        return step(self, images, targets)

    trainer.Trainer.train_step = wrapped


def main(task, folder):
    torch.set_num_threads(1)
    run_module.load_dataset = load
    if task == "plain":
        train(PLAIN, folder)
    elif task == "whole":
        train(CONFIG, folder)
    elif task == "stop":  # one rank alone gets the signal
        if os.environ["RANK"] == "1":
            before_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = train(CONFIG, folder)
        assert (result.stopped_by == signal.SIGTERM) == (os.environ["RANK"] == "1")
    elif task == "resume":
        train(CONFIG, folder, resume=True)
    elif task == "die":  # and be started again by torchrun
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            before_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))
        train(CONFIG, folder, options=RunOptions(save_seconds=0.0))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
