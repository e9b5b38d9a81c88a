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

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(root, *tasks, options=()):
    script = str(Path(__file__).with_name("ranks.py"))
    command = [*TORCHRUN, *options, script, str(root), *tasks]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(folder):
    return load_run(folder, "last").model.state_dict()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs of two processes: a plain one, an uninterrupted one, a stopped and resumed one."""
    root = tmp_path_factory.mktemp("ranks")
    launch(root, "plain", "whole", "cut")
    return root


def test_two_processes_do_what_one_does(root, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", load)
    train(PLAIN, tmp_path / "one")
    one, two = weights(tmp_path / "one"), weights(root / "plain")
    # sums of gradients are rounded in another order
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-5)


def test_stopped_and_resumed_to_the_bit(root):
    a, b = weights(root / "whole"), weights(root / "cut")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_killed_process_is_started_again_and_comes_to_the_same_bits(root):
    launch(root, "killed", options=("--max-restarts", "1"))
    a, b = weights(root / "whole"), weights(root / "killed")
    assert all(torch.equal(a[key], b[key]) for key in a)
