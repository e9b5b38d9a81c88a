"""Training: it learns, it resumes to the bit, it leaves whole runs."""

import json

import pytest
import torch
from tiny import TINY, load, stripes

from lsmha_fast.train import TrainConfig, load_run, train, trainer
from lsmha_fast.train import run as run_module


@pytest.fixture(autouse=True)
def _stripes(monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", load)


def test_a_run_learns_and_leaves_everything(tmp_path):
    config = TrainConfig(**{**TINY.__dict__, "epochs": 8, "drop_path": 0.0})
    result = train(config, tmp_path / "run")
    assert result.best_accuracy == 1.0
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        *(".lock", "config.json", "metrics.jsonl", "curves.png", "manifest.json"),
        *("best.safetensors", "last.safetensors"),
        *("state-00001-000000.pt", "state-00008-000000.pt"),
    }
    rows = [json.loads(r) for r in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in rows] == list(range(1, 9))
    assert rows[-1]["test_accuracy"] == result.last_accuracy
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_loaded_run_gives_the_recorded_accuracy(tmp_path):
    result = train(TINY, tmp_path / "run")
    for which, accuracy in (("best", result.best_accuracy), ("last", result.last_accuracy)):
        run = load_run(tmp_path / "run", which)
        assert run.config == TINY
        test = stripes("test")
        batches = trainer.Batches(test, 16, shuffle=False)
        assert trainer.evaluate(run.model, batches, test).accuracy == accuracy


@pytest.mark.parametrize("stop_at", [0, 4, 7])
def test_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, monkeypatch, stop_at):
    train(TINY, tmp_path / "whole")
    steps, step = iter(range(100)), trainer.Trainer.train_step

    def interrupted(self, *args):
        if next(steps) == stop_at:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, tmp_path / "cut")
    train(TINY, tmp_path / "cut", resume=True)
    for which in ("best", "last"):
        whole, cut = (load_run(tmp_path / n, which).model.state_dict() for n in ("whole", "cut"))
        assert all(torch.equal(whole[k], cut[k]) for k in whole)
    rows = [
        [json.loads(r)["test_loss"] for r in (tmp_path / n / "metrics.jsonl").open()]
        for n in ("whole", "cut")
    ]
    assert rows[0] == rows[1]


def test_finished_run_resumes_to_itself(tmp_path):
    first = train(TINY, tmp_path / "run")
    again = train(TINY, tmp_path / "run", resume=True)
    assert again[1:] == first[1:]


@pytest.mark.parametrize(
    "change",
    [
        {"mixup": 0.8, "cutmix": 1.0, "erase": 0.25},
        {"num_heads": (2, 64), "pre_norm": True},
        {"conv_blocks": 1, "conv_residual": True, "conv_form": "bottleneck", "conv_hidden": 24},
        {"dim": 64, "depth": 3, "positional_embedding": "sine", "train_images": 20},
        {"cooldown_epochs": 1, "lr_per_epoch": True, "drop_last": True},
        {"amp": "bf16"},
        {"pipeline": "device", "mixup": 0.8, "cutmix": 1.0, "erase": 0.25, "flip": 0.5},
        {"pipeline": "recipe", "cutmix": 1.0, "erase": 0.25, "flip": 0.5, "drop_last": True},
        {"augment": False, "label_smoothing": 0.0},
    ],
)
def test_options_run(tmp_path, change):
    result = train(TrainConfig(**{**TINY.__dict__, "epochs": 1, **change}), tmp_path / "run")
    assert 0.0 <= result.last_accuracy <= 1.0


def test_vectors_are_not_decayed():
    config = TINY
    model = run_module.build_model(config, 3)
    decayed, exempt = trainer.make_optimizer(model, config).param_groups
    assert decayed["weight_decay"] == config.weight_decay
    assert exempt["weight_decay"] == 0.0
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim <= 1 for p in exempt["params"])
    assert any(p is model.positional_emb for p in decayed["params"])


def test_refuses_a_folder_in_use(tmp_path):
    train(TINY, tmp_path / "run")
    with pytest.raises(ValueError, match="exists already"):
        train(TINY, tmp_path / "run")


@pytest.mark.parametrize(
    "device, words", [("tpu", "auto, cpu, cuda"), ("cuda:99", "GPUs"), ("mps", "auto, cpu")]
)
def test_unknown_devices(device, words):
    with pytest.raises(ValueError, match=words):
        run_module.pick_device(device)


def test_damaged_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        load_run(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        load_run(tmp_path / "empty")
    train(TINY, tmp_path / "run")
    other = TrainConfig(**{**TINY.__dict__, "model": "cct_4_3x2_32"})
    (tmp_path / "run/config.json").write_text(other.to_json())
    with pytest.raises(ValueError, match="does not fit"):
        load_run(tmp_path / "run")
