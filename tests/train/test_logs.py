"""Lines, TensorBoard, trackers, curves, profile."""

import dataclasses
import json
import sys
import types

import pytest
from tiny import TINY, load

from lsmha_fast.train import RunOptions, train
from lsmha_fast.train import run as run_module
from lsmha_fast.train.logs import duration
from lsmha_fast.train.profile import KINDS, kind, profile

QUICK = dataclasses.replace(TINY, dim=32, depth=1, num_heads=4, epochs=2)


@pytest.fixture(autouse=True)
def _stripes(monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", load)


def test_a_line_per_epoch_says_where_the_run_is(tmp_path):
    lines = []
    train(QUICK, tmp_path / "run", options=RunOptions(silent=False), say=lines.append)
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/2  loss ")
    for word in ("test ", "best ", "images/s", "ETA "):
        assert word in lines[1]
    assert (tmp_path / "run/curves.png").read_bytes()[:4] == b"\x89PNG"


def test_tensorboard_holds_the_rows(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(QUICK, tmp_path / "run", options=RunOptions(tensorboard=True))
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    scalars = events.Scalars("test_loss")
    assert [s.step for s in scalars] == [1, 2]
    assert [s.value for s in scalars] == pytest.approx([r["test_loss"] for r in rows])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_config_and_rows(tmp_path, monkeypatch, name):
    calls = []
    fake = types.SimpleNamespace(
        init=lambda **options: calls.append(("init", options)),
        log=lambda row: calls.append(("log", row)),
        finish=lambda: calls.append(("finish", None)),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    train(QUICK, tmp_path / "run", options=RunOptions(tracker=name))
    assert [call[0] for call in calls] == ["init", "log", "log", "finish"]
    assert calls[0][1]["config"]["epochs"] == 2
    assert calls[2][1]["epoch"] == 2


@pytest.mark.parametrize(
    "name, words", [("mlflow", "wandb, trackio, got mlflow"), ("wandb", "pip")]
)
def test_trackers_that_are_not_there(tmp_path, monkeypatch, name, words):
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises((ValueError, ModuleNotFoundError), match=words):
        train(QUICK, tmp_path / "run", options=RunOptions(tracker=name))
    assert not (tmp_path / "run").exists()


def test_durations():
    assert [duration(s) for s in (12.4, 185, 3725)] == ["12 s", "3 min 05 s", "1 h 02 min"]


def test_profile_writes_a_trace_and_a_table(tmp_path):
    lines = list(profile(QUICK, tmp_path / "profile", 2))
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == [
        "profile.md", "trace.json.gz"
    ]  # fmt: skip
    rows = {line.split("|")[1].strip(): line.split("|")[2:6] for line in lines if "|" in line}
    for label, column in (("attention", 1), ("attention", 2), ("optimizer", 3)):
        assert float(rows[label][column]) > 0.0, label
    parts = [sum(float(rows[k][c]) for k in rows if rows[k][c].strip()[:1].isdigit() and k != "all")
             for c in range(4)]  # fmt: skip
    for c in range(4):
        assert float(rows["all"][c]) == pytest.approx(parts[c], abs=0.1)
    with pytest.raises(ValueError, match="at least 1"):
        list(profile(QUICK, tmp_path / "none", 0))
    with pytest.raises(ValueError, match="exists already"):
        list(profile(QUICK, tmp_path / "profile", 1))


def test_kinds_of_operators():
    names = {
        "lsmha_fast::attention_packed": "attention",
        "aten::convolution_backward": "products and convolutions",
        "lsmha_fast::conv_stem": "stem",
        "aten::addmm": "products and convolutions",
        "aten::native_layer_norm": "norms",
        "aten::_fused_adamw_": "optimizer",
        "aten::gelu_backward": "gelu",
        "aten::copy_": "copies and fills",
        "phase: step": "Python and other",
    }
    assert {name: kind(name) for name in names} == names
    assert set(names.values()) <= {label for label, _ in KINDS} | {"Python and other"}
