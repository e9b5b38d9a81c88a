"""SIGKILL a run at random moments, again and again: its last state must always load.

python tests/train/kills.py --kills 200

The run saves after every step, so that most kills hit a half-written file. At the end the run is
left alone, and must come to the bits of one that was never killed.
"""

import argparse
import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401  imported before the forks, so that these start quickly
import safetensors.torch  # noqa: F401
import torch
import tqdm  # noqa: F401
from tiny import TINY, load

from lsmha_fast._ext import ext_missing
from lsmha_fast.train import RunOptions, load_run, train
from lsmha_fast.train import run as run_module
from lsmha_fast.train.checkpoint import load_checkpoint, read_manifest

ext_missing()  # loads the native library
CONFIG = dataclasses.replace(TINY, dim=32, depth=1, num_heads=4, epochs=20, cutmix=1.0)


def train_in_child(folder):
    """Train in a forked process; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        train(CONFIG, folder, resume="auto", options=RunOptions(save_seconds=0.0))
    except BaseException as error:
        print(f"the run itself failed: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def wait_for_new_state(child, folder):
    """Until the child has written a manifest, or ended: the one before may have done all."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT  # it is still to be waited for
    manifest, start = folder / "manifest.json", time.time()
    while time.time() - start < 30:
        if manifest.exists() and manifest.stat().st_mtime > start:
            return
        if os.waitid(os.P_PID, child, flags) is not None:
            return
        time.sleep(0.01)
    raise TimeoutError("the run saves nothing")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run_module.load_dataset = load
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    root = Path(tempfile.mkdtemp())
    cut, whole = root / "cut", root / "whole"
    killed, loaded, left_parts, places = 0, 0, 0, set()
    while killed < args.kills:
        child = train_in_child(cut)
        wait_for_new_state(child, cut)
        time.sleep(rng.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):  # it came to its end first
            assert os.WEXITSTATUS(status) == 0
            shutil.rmtree(cut)
            continue
        killed += 1
        if read_manifest(cut):
            state = load_checkpoint(cut)
            loaded += 1
            places.add((state["epoch"], state["step"]))
        left_parts += any(cut.glob(".*.part")) if cut.exists() else 0
    for folder in (cut, whole):
        _, status = os.waitpid(train_in_child(folder), 0)
        assert status == 0, status
    for which in ("best", "last"):
        a, b = (load_run(folder, which).model.state_dict() for folder in (cut, whole))
        assert all(torch.equal(a[key], b[key]) for key in a), which
    assert (cut / "metrics.jsonl").read_text().count("\n") == CONFIG.epochs
    shutil.rmtree(root)
    assert loaded > args.kills // 2, "most kills came before there was anything to lose"
    print(
        f"{killed} kills, {left_parts} of them in the middle of a file; "
        f"{loaded} states loaded, {len(places)} different ones; the end is the uninterrupted one"
    )


if __name__ == "__main__":
    main()
