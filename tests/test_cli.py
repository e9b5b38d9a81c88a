"""The command line as a user meets it: help, one-line errors, exit codes, nothing half-written."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lsmha_fast.cli import main, make_parser
from lsmha_fast.train import TrainConfig


def fail(capsys, *argv):
    """Run `lsmha` in process, expect exit code 2 and one line on stderr; return the line."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err


def test_help_is_fast_and_imports_no_torch():
    command = [
        sys.executable,
        "-c",
        "import sys; from lsmha_fast.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules",
    ]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.4


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "reproduce",
        "shp",
        "committee",
        "prune",
        "report",
        "data",
        "info",
        "latency",
        "arch",
        "export",
        "classify",
    ],
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: lsmha" in capsys.readouterr().out


def test_every_field_of_the_config_is_a_flag():
    args = make_parser().parse_args(["train", "--no-augment", "--num-heads", "4,16", "--lr", "0.1"])
    assert (args.augment, args.num_heads, args.lr) == (False, (4, 16), 0.1)
    actions = next(iter(make_parser()._subparsers._group_actions)).choices["train"]._actions
    flags = {flag for action in actions for flag in action.option_strings}
    assert {"--" + name.replace("_", "-") for name in TrainConfig.__dataclass_fields__} <= flags


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["COMMAND"]),
        (["fly"], ["fly", "train"]),
        (["train", "--epochs", "many"], ["--epochs", "many"]),
        (["train", "--epochs", "0"], ["--epochs", "0", "at least 1"]),
        (["train", "--lr", "-1"], ["--lr", "-1"]),
        (["train", "--colour", "red"], ["--colour"]),
        (["train", "--data", "mnist"], ["mnist", "glyphs100"]),
        (["train", "--model", "vit_b_16"], ["vit_b_16", "cct_7_3x1_32"]),
        (["train", "--num-heads", "12"], ["128", "12", "head_dim"]),
        (["train", "--num-heads", "x"], ["--num-heads", "x"]),
        (["train", "--num-heads", "2,2,2"], ["2 numbers", "3 numbers"]),
        (["train", "--model", "cct_7_7x2_224"], ["224x224", "32x32"]),
        (["train", "--device", "tpu"], ["tpu", "cuda"]),
        (["train", "--backend", "magic"], ["magic", "reference"]),
        (["train", "--amp", "fp16", "--device", "cpu"], ["fp16", "bf16"]),
        (["train", "--data", "cifar100", "--data-root", "missing"], ["missing"]),
        (["train", "--data", "cifar100"], ["--data-root"]),
        (["train", "--resume", "missing"], ["missing"]),
        (["train", "--resume", "missing", "--lr", "1"], ["--lr"]),
        (["shp", "missing"], ["missing"]),
        (["shp", "missing", "--threshold", "0"], ["--threshold", "0"]),
        (["shp", "missing", "--probe-epochs", "1.5"], ["--probe-epochs", "1.5"]),
        (["shp", "missing", "--normalize", "column"], ["--normalize", "column", "row"]),
        (["shp", "missing", "--disk-cache-gib", "-1"], ["--disk-cache-gib", "-1"]),
        (["prune", "missing"], ["missing"]),
        (["prune", "missing", "--criterion", "magic"], ["--criterion", "magic", "afcc"]),
        (["prune", "missing", "--keep-per-label", "0"], ["--keep-per-label", "0"]),
        (["committee"], ["RUN"]),
        (["committee", "missing"], ["at least two runs", "1"]),
        (["committee", "missing", "absent"], ["missing"]),
        (["committee", "missing", "missing"], ["missing", "once"]),
        (["committee", "a", "b", "--samples", "0"], ["--samples", "0"]),
        (["data", "verify", "cifar100", "--data-root", "missing"], ["missing"]),
        (["data", "verify", "cifar100"], ["--data-root"]),
        (["data", "show", "svhn", "--out", "x.png"], ["svhn", "digits"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    err = fail(capsys, *argv)
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


def test_corrupted_archive(capsys, tmp_path):
    (tmp_path / "cifar-100-binary.tar.gz").write_bytes(b"\x1f\x8bnot an archive" * 100)
    before = sorted(p.name for p in tmp_path.iterdir())
    for argv in (
        ["data", "verify", "cifar100", "--data-root", tmp_path],
        ["train", "--data", "cifar100", "--data-root", tmp_path, "--out", tmp_path / "run"],
    ):
        assert "cifar-100-binary.tar.gz" in fail(capsys, *argv)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_corrupted_run(capsys, tmp_path):
    (tmp_path / "config.json").write_text(TrainConfig().to_json())
    assert "no weights" in fail(capsys, "shp", tmp_path)
    (tmp_path / "best.safetensors").write_bytes(b"junk" * 100)
    assert "best.safetensors" in fail(capsys, "shp", tmp_path)
    assert not (tmp_path / "shp").exists()


def test_committee_of_runs_that_do_not_fit(capsys, tmp_path):
    runs = tmp_path / "a", tmp_path / "b"
    for run, data in zip(runs, ("digits", "glyphs100"), strict=True):
        run.mkdir()
        (run / "config.json").write_text(TrainConfig(data=data).to_json())
    err = fail(capsys, "committee", *runs)
    assert "trained on glyphs100 (easy)" in err
    assert "digits" in err
    (runs[1] / "config.json").write_text(TrainConfig(seed=1).to_json())
    assert "best.safetensors" in fail(capsys, "committee", *runs)
    assert not (tmp_path / "committee").exists()


def test_committee_of_runs(capsys, tmp_path):
    """Untrained members of two architectures, one with two seeds: printed and written."""
    from safetensors.torch import save_file

    from lsmha_fast.train.run import build_model

    runs = []
    for heads, seed in ((4, 0), (4, 1), (16, 0)):
        config = TrainConfig(num_heads=heads, seed=seed)
        runs.append(tmp_path / f"h{heads}-s{seed}")
        runs[-1].mkdir()
        (runs[-1] / "config.json").write_text(config.to_json())
        save_file(build_model(config, 10).state_dict(), runs[-1] / "best.safetensors")
    assert main(["committee", *map(str, runs), "--samples", "50"]) == 0
    out = capsys.readouterr().out
    assert "h4-s1 (cct_2_3x2_32 4 heads)" in out
    assert "2 architectures - 2 seeds of one" in out
    names = {path.name for path in (tmp_path / "committee").iterdir()}
    assert names == {"summary.json", "summary.txt", "committee.png"}
    record = json.loads((tmp_path / "committee" / "summary.json").read_text())
    assert record["origin"]["command"].startswith("lsmha committee ")


def test_existing_out_folder_is_kept(capsys, tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    assert "--resume" in fail(capsys, "train", "--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("signal_name, code", [("SIGINT", 130), ("SIGTERM", 0)])
def test_interrupted_run_can_be_resumed(tmp_path, signal_name, code):
    import signal

    env = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "lsmha_fast", "train", "--out", str(tmp_path / "run")]
    options = ["--epochs", "50", "--batch-size", "64", "--num-heads", "4"]
    process = subprocess.Popen(
        command + options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send_signal(getattr(signal, signal_name))
    _, err = process.communicate(timeout=10)  # a stop saves within 10 s
    assert process.returncode == code, err
    assert f"lsmha train --resume {tmp_path / 'run'}" in err
    assert "Traceback" not in err
    from lsmha_fast.train import load_run

    assert load_run(tmp_path / "run", "last").config.epochs == 50


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if path.exists() and path.stat().st_size:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"{path} did not appear")
