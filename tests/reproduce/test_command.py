"""`lsmha reproduce`: trains what is missing, skips what is there, writes one page."""

import json

import pytest

from lsmha_fast.cli import main
from lsmha_fast.reproduce import manifests

FLAGS = [
    *("--data", "digits", "--pipeline", "light", "--model", "cct_2_3x2_32", "--dim", "32"),
    *("--train-images", "64", "--batch-size", "32", "--scale", "0.006", "--probe-epochs", "1"),
]


@pytest.fixture
def _two_runs(monkeypatch):
    plan = manifests.Plan("Two networks", ("heads-4", "heads-8"), ("heads-8",))
    monkeypatch.setitem(manifests.PLANS, "early", plan)


@pytest.mark.usefixtures("_two_runs")
def test_a_manifest_from_nothing_to_the_page_and_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["reproduce", "early", "--out", str(tmp_path), *FLAGS]
    assert main(command) == 0
    page = (tmp_path / "page.md").read_text()
    rows = [json.loads(r) for r in (tmp_path / "runs/heads-8-s42/metrics.jsonl").open()]
    for words in (
        "# Two networks",
        "Data: digits",
        "**Shortened to 0.006 of the recipe**: 2 epochs",
        "These are not CIFAR-100 numbers",
        f"{100 * rows[-1]['test_accuracy']:.2f}",
        "| heads-8-s42 | block 2 | 8 ",
        "| logit       | 2 ",
        "![test accuracy by epoch](curves.png)",
    ):
        assert words in page, words
    assert (tmp_path / "curves.png").is_file()
    capsys.readouterr()

    (tmp_path / "runs/heads-8-s42/last.safetensors").unlink()
    assert main([*command, "--page-only"]) == 0
    assert "Not finished: heads-8-s42" in capsys.readouterr().out
    before = (tmp_path / "runs/heads-4-s42/manifest.json").stat().st_mtime_ns
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "heads-4-s42: finished before" in out
    assert "heads-8-s42: training" in out
    assert (tmp_path / "runs/heads-4-s42/manifest.json").stat().st_mtime_ns == before
    assert (tmp_path / "page.md").read_text() == page

    assert main([*command, "--lr", "0.1"]) == 2  # another recipe in the same folder
    assert "another config: lr" in capsys.readouterr().err


@pytest.mark.usefixtures("_two_runs")
def test_a_run_that_fails_is_named(tmp_path, capsys):
    command = ["reproduce", "early", "--out", str(tmp_path), *FLAGS, "--num-heads", "5"]
    assert main(command) == 2
    assert "no run of early has finished an epoch" in capsys.readouterr().err
    assert "5" in (tmp_path / "logs/heads-4-s42.log").read_text()


def test_dry_run_lists_the_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "baselines", "--seeds", "2", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *("compact-300-s42: 310 epochs", "compact-1500-s42: 1510 epochs"),
        *("compact-5000-s42: 5010 epochs", "compact-300-s43: 310 epochs"),
        *("compact-1500-s43: 1510 epochs", "compact-5000-s43: 5010 epochs"),
    ]
    assert list(tmp_path.iterdir()) == []
