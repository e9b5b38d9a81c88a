"""`lsmha prune`: what it writes, and that the pruned run is a run like any other."""

import json

import numpy as np
import pytest
import torch
from train.tiny import stripes

from lsmha_fast.cli import main
from lsmha_fast.train import TrainConfig, load_run, train
from lsmha_fast.train import run as run_module

KEYS = {
    "method", "seed", "removed", "kept_per_block", "accuracy_before", "accuracy_after",
    "accuracy_finetuned", "ms_before", "ms_after", "macs_before", "macs_after",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _stripes(monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", lambda name, split, *_, **__: stripes(split))


@pytest.fixture
def run(tmp_path):
    config = TrainConfig(num_heads=(8, 16), epochs=2, batch_size=16, lr=1e-3, warmup_epochs=1)
    train(config, tmp_path / "run")
    return tmp_path / "run"


QUICK = ["--probe-epochs", "3", "--timing-rounds", "1", "--timing-batch", "2", "--steps", "2"]


def test_pruned_run_is_a_run(run, capsys):
    command = ["prune", str(run), "--number", "10", "--random-seeds", "2", *QUICK]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "10 of 24 heads removed" in out
    summary = json.loads((run / "prune/summary.json").read_text())
    assert {p.name for p in (run / "prune").iterdir()} == set(summary["files"])
    assert {"criterion", "split", "rows", "choices", "command", "versions"} <= set(summary)
    assert (summary["criterion"], summary["split"], summary["target"]) == ("shp", "test", 10)
    rows = summary["rows"]
    assert all(set(row) >= KEYS for row in rows)
    assert [row["removed"] for row in rows[::4]] == [10, 11, 22]
    assert [row["method"] for row in rows[:4]] == ["shp", "magnitude", "random", "random"]
    assert [row["seed"] for row in rows[:4]] == [None, None, 0, 1]
    kept = np.load(run / "prune/prune.npz")
    for n, row in enumerate(rows):
        by_block = np.split(kept[f"kept.{n}"], [8])
        assert [int(k.sum()) for k in by_block] == row["kept_per_block"]
        assert 24 - sum(row["kept_per_block"]) == row["removed"]
        assert row["macs_after"] < row["macs_before"]

    pruned = load_run(run.with_name("run-pruned"))
    assert pruned.config.num_heads == tuple(rows[0]["kept_per_block"])
    assert pruned.config.head_dim == (16, 8)
    # the saved model is the one of the row
    test = stripes("test")
    from lsmha_fast.data import Batches
    from lsmha_fast.train.evaluation import evaluate

    accuracy = evaluate(pruned.model, Batches(test, 16), test).accuracy
    assert accuracy == rows[0]["accuracy_after"]
    # and other commands take it
    folder = str(run.with_name("run-pruned"))
    assert main(["shp", folder, "--probe-epochs", "1", "--no-null"]) == 0
    assert main(["train", "--resume", folder]) == 0
    assert main(["committee", str(run), folder, "--samples", "10"]) == 0
    assert main(["prune", folder, *QUICK, "--pruned-run", folder + "2"]) == 0


def test_finetuning_is_part_of_the_pruned_run(run):
    small = run.with_name("small")
    options = ["--fraction", "0.5", "--finetune-epochs", "2", "--random-seeds", "1", "--steps", "1"]
    assert main(["prune", str(run), "--pruned-run", str(small), *QUICK[:-2], *options]) == 0
    rows = json.loads((run / "prune/summary.json").read_text())["rows"]
    tuned = [row for row in rows if row["accuracy_finetuned"] is not None]
    assert [row["method"] for row in tuned] == ["shp", "magnitude", "random"]
    assert {row["removed"] for row in tuned} == {12}
    metrics = [json.loads(line) for line in (small / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in metrics] == [1, 2]
    assert metrics[-1]["test_accuracy"] == tuned[0]["accuracy_finetuned"]
    config = load_run(small).config
    assert (config.epochs, config.lr, config.warmup_epochs) == (2, 1e-4, 0.0)


def test_max_drop_and_cover_choose_on_other_images(run, capsys):
    whole = ["--max-drop", "1", "--random-seeds", "0"]
    assert main(["prune", str(run), *QUICK, *whole, "--pruned-run", str(run) + "-a"]) == 0
    assert json.loads((run / "prune/summary.json").read_text())["target"] == 22
    assert "not held out" not in capsys.readouterr().out
    same = ["--choice-split", "test", "--random-seeds", "0", "--keep-per-label", "2"]
    assert main(["prune", str(run), *QUICK, *same, "--pruned-run", str(run) + "-b"]) == 0
    assert "not held out" in capsys.readouterr().out
    summary = json.loads((run / "prune/summary.json").read_text())
    target = [row for row in summary["rows"] if row["removed"] == summary["target"]]
    assert target[0]["uncovered"] == 0


@pytest.mark.parametrize(
    "options, words",
    [
        (["--number", "23"], ["0 to 22", "23"]),
        (["--number", "3", "--fraction", "0.5"], ["--fraction", "--number"]),
        (["--fraction", "1.5"], ["--fraction", "0..1", "1.5"]),
        (["--threshold", "0"], ["--threshold", "0"]),
        (["--steps", "0"], ["--steps", "at least 1"]),
        (["--pruned-run", "."], ["--pruned-run", "exists"]),
    ],
)
def test_bad_input_writes_nothing(run, options, words, capsys, monkeypatch):
    monkeypatch.chdir(run)
    before = sorted(run.parent.rglob("*"))
    assert main(["prune", str(run), "--probe-epochs", "1", *options]) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert sorted(run.parent.rglob("*")) == before


def test_other_files_in_the_folder_are_kept(run, capsys):
    (run / "prune").mkdir()
    (run / "prune/precious.txt").write_text("keep")
    assert main(["prune", str(run)]) == 2
    assert "precious.txt" in capsys.readouterr().err
    assert torch.is_tensor(load_run(run).model.fc.weight)


@pytest.mark.parametrize("criterion", ["andc", "afcc"])
def test_connections_against_controls(run, criterion, capsys):
    small = run.with_name("small")
    options = ["--criterion", criterion, "--random-seeds", "1", "--threshold", "0.8", *QUICK]
    assert main(["prune", str(run), "--pruned-run", str(small), *options]) == 0
    assert "connections removed" in capsys.readouterr().out
    summary = json.loads((run / "prune/summary.json").read_text())
    rows = summary["rows"]
    assert len(rows) == 8 * 3
    for of_one in (rows[n : n + 3] for n in range(0, 24, 3)):
        assert [row["method"] for row in of_one] == [criterion, "magnitude", "random"]
        assert len({row["removed"] for row in of_one}) == 1
        assert len({tuple(row["kept_per_block"]) for row in of_one}) == 1
        assert of_one[0]["removed"] == of_one[0]["total"] - sum(of_one[0]["kept_per_block"])
        assert all(row["macs_after"] <= row["macs_before"] for row in of_one)
    chosen = next(r for r in rows if r["threshold"] == 0.8)
    assert summary["target"] == chosen["removed"] > 0
    test = stripes("test")
    from lsmha_fast.data import Batches
    from lsmha_fast.train.evaluation import evaluate

    model = load_run(small).model
    assert evaluate(model, Batches(test, 16), test).accuracy == chosen["accuracy_after"]


def test_what_is_for_heads_alone_is_refused(run, capsys):
    command = ["prune", str(run), "--criterion", "afcc", "--finetune-epochs", "1"]
    assert main(command) == 2
    assert "--finetune-epochs: only for heads" in capsys.readouterr().err
