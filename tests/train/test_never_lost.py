"""Never lost, never wrong: kills, stops, full disks, two processes, a loss that is not finite."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY, load

from lsmha_fast.train import RunOptions, load_run, train, trainer
from lsmha_fast.train import run as run_module
from lsmha_fast.train.checkpoint import load_checkpoint, load_state, read_manifest
from lsmha_fast.train.lock import locked

EVERY_STEP = RunOptions(save_seconds=0.0)
QUICK = dataclasses.replace(TINY, dim=32, depth=2, num_heads=4, epochs=2, mixup=0.8, erase=0.25)


@pytest.fixture(autouse=True)
def _stripes(monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", load)


def before_step(monkeypatch, number, action):
    """Run `action(trainer, images)` before the step of that number, counted over the run."""
    step, count = trainer.Trainer.train_step, iter(range(10_000))

    def wrapped(self, images, targets):
        if next(count) == number:
            action(self, images)
        return step(self, images, targets)

    monkeypatch.setattr(trainer.Trainer, "train_step", wrapped)


def assert_same(folder, other):
    for which in ("best", "last"):
        a, b = (load_run(f, which).model.state_dict() for f in (folder, other))
        assert all(torch.equal(a[key], b[key]) for key in a), which
    rows = [[json.loads(r) for r in (f / "metrics.jsonl").open()] for f in (folder, other)]
    for row in (*rows[0], *rows[1]):
        del row["seconds"], row["train_images_per_s"]
    assert rows[0] == rows[1]


@pytest.fixture
def whole(tmp_path):
    """An uninterrupted run."""
    train(QUICK, tmp_path / "whole")
    return tmp_path / "whole"


def test_twenty_kills():
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), "--kills", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "20 kills" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [0, 4])
def test_a_signal_saves_between_two_steps(tmp_path, monkeypatch, whole, number, step):
    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        before_step(patch, step, lambda *_: os.kill(os.getpid(), number))
        result = train(QUICK, folder)
    assert result.stopped_by == number
    saved = load_checkpoint(folder)
    assert (saved["epoch"], saved["step"]) == divmod(step + 1, 3)
    assert train(QUICK, folder, resume=True).stopped_by is None
    assert_same(folder, whole)


def test_a_signal_ends_an_evaluation(tmp_path, monkeypatch, whole):
    evaluate, folder = trainer.evaluate, tmp_path / "cut"

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", interrupted)
        assert train(QUICK, folder).stopped_by == signal.SIGTERM
    assert load_checkpoint(folder)["step"] == 3
    train(QUICK, folder, resume=True)
    assert_same(folder, whole)


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path, monkeypatch, whole):
    folder, limits = tmp_path / "cut", resource.getrlimit(resource.RLIMIT_FSIZE)
    before_step(
        monkeypatch, 2, lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    )
    try:
        with pytest.raises(OSError, match=r"cannot write .*cut/state-00001-000000\.pt"):
            train(QUICK, folder, options=EVERY_STEP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(folder)["step"] == 2
    assert not list(folder.glob(".*.part"))
    train(QUICK, folder, resume=True)
    assert_same(folder, whole)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)  # root may write everywhere
    try:
        with pytest.raises(PermissionError, match="closed|pytest"):
            train(QUICK, tmp_path / "closed" / "run")
    finally:
        os.seteuid(user)
    assert list((tmp_path / "closed").iterdir()) == []


def test_a_second_process_is_refused(whole):
    before = sorted(p.name for p in whole.iterdir())
    with locked(whole), pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        train(QUICK, whole, resume=True)
    assert sorted(p.name for p in whole.iterdir()) == before
    train(QUICK, whole, resume=True)  # free again


def test_a_loss_that_is_not_finite_keeps_the_step_before(tmp_path, monkeypatch):
    folder, weights = tmp_path / "run", {}

    def poison(self, images):
        weights.update({k: v.clone() for k, v in self.model.state_dict().items()})
        images[0, 0, 0, 0] = float("nan")

    with monkeypatch.context() as patch:
        before_step(patch, 4, poison)
        with pytest.raises(ValueError, match="epoch 2, step 2; .*diverged.pt; a lower --lr"):
            train(QUICK, folder, options=EVERY_STEP)
    facts = json.loads((folder / "diverged.json").read_text())
    assert (facts["epoch"], facts["step"]) == (1, 1)
    kept = load_state(folder / "diverged.pt")
    assert (kept["epoch"], kept["step"]) == (1, 1)
    assert all(torch.equal(kept["model"][key], weights[key]) for key in weights)
    saved = load_checkpoint(folder)  # which was made before that step
    assert (saved["epoch"], saved["step"]) == (1, 1)
    train(QUICK, folder, resume=True)
    train(QUICK, tmp_path / "whole")
    assert_same(folder, tmp_path / "whole")


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "weights_are_finite", lambda self: self.epoch == 0)
        with pytest.raises(ValueError, match="not finite"):
            train(QUICK, tmp_path / "run", options=EVERY_STEP)
    assert load_checkpoint(tmp_path / "run")["epoch"] == 0


def test_a_damaged_state_is_passed_over(whole, tmp_path):
    newest, older = read_manifest(whole)
    path = whole / newest["file"]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert load_checkpoint(whole)["epoch"] == older["epoch"] == 1
    (whole / older["file"]).unlink()
    with pytest.raises(ValueError, match="none of the 2 states"):
        load_checkpoint(whole)


def test_auto_resume(tmp_path, whole):
    first = train(QUICK, tmp_path / "run", resume="auto")
    assert train(QUICK, tmp_path / "run", resume="auto") == first
    with pytest.raises(ValueError, match="another config: lr"):
        train(dataclasses.replace(QUICK, lr=1.0), tmp_path / "run", resume="auto")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(ValueError, match="not a run folder"):
        train(QUICK, tmp_path / "other", resume="auto")


def test_torn_metrics_line_is_dropped(whole):
    with (whole / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "lr"')
    assert [row["epoch"] for row in run_module.read_metrics(whole)] == [1, 2]
    train(QUICK, whole, resume=True)
    assert (whole / "metrics.jsonl").read_text().endswith("}\n")
