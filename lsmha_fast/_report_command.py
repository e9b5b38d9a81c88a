"""`lsmha report`: one HTML page from a run folder."""

from __future__ import annotations

import shlex
from dataclasses import MISSING, asdict, fields
from pathlib import Path

from .analysis.report.page import check_page, write_page
from .analysis.report.source import read_measured
from .train.config import TrainConfig
from .train.run import METRICS, read_config, read_metrics


def report_of_run(run: Path, out: Path, *, command: str) -> Path:
    """Write the page of a run.

    Args:
        run: what `lsmha train` wrote, with the `shp` folder of `lsmha shp` in it.
        out: the HTML file.
        command: the command line that asked for the page, to be shown on it.

    Raises:
        ValueError, OSError: not a run, nothing measured yet, damaged files, or a foreign `out`.
    """
    config = read_config(run)
    check_page(out)
    try:
        metrics = read_metrics(run)
        for row in metrics:
            _ = row["epoch"], row["test_accuracy"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run / METRICS}: not readable metrics ({error})") from error
    measured = read_measured(run / "shp", run=run, config=asdict(config), metrics=metrics)
    commands = {
        "Training, as config.json has it": train_command(config),
        "Measurement": shp_command(run, measured.summary),
        "This page": command,
    }
    return write_page(out, measured, commands=commands)


def train_command(config: TrainConfig) -> str:
    """`lsmha train` with every flag that is not the default."""
    words = ["lsmha", "train"]
    for f in fields(config):
        value = getattr(config, f.name)
        if f.default is not MISSING and value == f.default:
            continue
        flag = f.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            words += [f"--{flag}", text]
    return shlex.join(words)


def shp_command(run: Path, summary: dict) -> str:
    """The command that measured; from the choices it left where the command was not kept."""
    kept = (summary.get("origin") or {}).get("command")
    if kept:
        return str(kept)
    choices, probe = summary["choices"], summary.get("probe_settings") or {}
    words = ["lsmha", "shp", str(run)]
    for flag, value in {
        "--probe-epochs": probe.get("epochs"),
        "--probe-lr": probe.get("lr"),
        "--pooling": choices.get("pooling"),
        "--threshold": choices["threshold"],
    }.items():
        words += [flag, str(value)] if value is not None else []
    words += ["--bias"] if choices.get("bias") else []
    words += ["--layer-norm"] if choices.get("layer_norm") else []
    return shlex.join(words)
