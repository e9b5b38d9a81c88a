"""`lsmha report` as a user meets it."""

import json

import pytest
from test_cli import fail

from lsmha_fast._report_command import train_command
from lsmha_fast.cli import make_parser
from lsmha_fast.train import TrainConfig


@pytest.fixture
def run(tmp_path):
    """A run folder that was trained but not measured."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(TrainConfig(num_heads=(4, 16), augment=False).to_json())
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "test_accuracy": 0.5}\n')
    return folder


def test_errors_are_one_line_and_nothing_is_written(run, tmp_path, capsys):
    assert "no run folder" in fail(capsys, "report", tmp_path / "missing")
    assert "run `lsmha shp` first" in fail(capsys, "report", run)
    assert "is a folder" in fail(capsys, "report", run, "--out", tmp_path)
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert "not readable metrics" in fail(capsys, "report", run)
    assert not (run / "report.html").exists()


def test_training_command_gives_the_config_again():
    config = TrainConfig(data="glyphs100", num_heads=(4, 16), augment=False, lr=1e-3, seed=7)
    words = train_command(config).split()
    assert words[:2] == ["lsmha", "train"]
    args = vars(make_parser().parse_args(words[1:]))
    fields = json.loads(config.to_json())
    given = {name: args[name] for name in fields if name in args}
    assert TrainConfig(**given) == config
    assert "--tier" not in words
