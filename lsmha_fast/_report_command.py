"""`lsmha report`: one HTML page from a run folder."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ._train_command import config_flags
from .analysis.page import check_page, read_measured, write_page
from .info import versions
from .train.config import TrainConfig
from .train.run import METRICS, read_config, read_metrics


def report_of_run(
    run: Path, out: Path, *, command: str, shp: Path | None = None, committee: Path | None = None
) -> Path:
    """Write the page of a run.

    Args:
        run: what `lsmha train` wrote.
        out: the HTML file.
        command: the command line that asked for the page, to be shown on it.
        shp: folder of `lsmha shp`; by default `shp` in the run folder.
        committee: folder of `lsmha committee`; by default `committee` beside or in the run folder,
            where the run is a member.

    Raises:
        ValueError, OSError: not a run, nothing measured yet, damaged files, or a foreign `out`.
    """
    config = read_config(run)
    check_page(out)
    measured = read_measured(
        run, shp=shp, committee=committee, config=asdict(config), metrics=_metrics(run)
    )
    commands = {
        "Training, as config.json has it": train_command(config),
        "This page": command,
    }
    return write_page(out, measured, commands=commands, versions=versions())


def _metrics(run: Path) -> list[dict[str, Any]]:
    try:
        rows = read_metrics(run)
        for row in rows:
            float(row["epoch"]), float(row["test_accuracy"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run / METRICS}: not readable metrics ({error!r})") from error
    return rows


def train_command(config: TrainConfig) -> str:
    """`lsmha train` with every flag that is not the default."""
    return shlex.join(["lsmha", "train", *config_flags(config)])
