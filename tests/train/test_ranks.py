"""One run on two processes over gloo: the same as on one, stopped, resumed, killed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import PLAIN
from tiny import load

from lsmha_fast.train import load_run, train
from lsmha_fast.train import run as run_module
from lsmha_fast.train.checkpoint import load_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(task, folder, *options):
    script = str(Path(__file__).with_name("ranks.py"))
    command = [*TORCHRUN, *options, script, task, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def weights(folder):
    return load_run(folder, "last").model.state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("ranks") / "whole"
    launch("whole", folder)
    return folder


def test_two_processes_do_what_one_does(tmp_path, monkeypatch):
    launch("plain", tmp_path / "two")
    monkeypatch.setattr(run_module, "load_dataset", load)
    train(PLAIN, tmp_path / "one")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    # sums of gradients are rounded in another order
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-5)


def test_stopped_and_resumed_to_the_bit(tmp_path, whole):
    launch("stop", tmp_path / "cut")
    saved = load_checkpoint(tmp_path / "cut")
    assert (saved["epoch"], saved["step"]) == (1, 1)
    launch("resume", tmp_path / "cut")
    a, b = weights(whole), weights(tmp_path / "cut")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_killed_process_is_started_again_and_comes_to_the_same_bits(tmp_path, whole):
    launch("die", tmp_path / "cut", "--max-restarts", "1")
    a, b = weights(whole), weights(tmp_path / "cut")
    assert all(torch.equal(a[key], b[key]) for key in a)
