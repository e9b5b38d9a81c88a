"""What the runs of a manifest came to, read from their folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from ..train.run import read_metrics
from .manifests import PUBLISHED, Manifest, PlannedRun


class RunNumbers(NamedTuple):
    """One run, as far as it came; accuracies in percent."""

    run: PlannedRun
    best: float
    best_epoch: int
    last: float
    minutes: float
    images_per_s: float
    curve: tuple[float, ...]


class Group(NamedTuple):
    """All seeds of one preset; `published` is given where the whole recipe ran to its end."""

    preset: str
    runs: tuple[RunNumbers, ...]
    published: float | None

    @property
    def curve(self) -> tuple[float, ...]:
        """Test accuracy by epoch, mean over the seeds, as far as all of them came."""
        curves = [run.curve for run in self.runs]
        return tuple(mean(points) for points in zip(*curves, strict=False))


def read_groups(manifest: Manifest, out: Path) -> list[Group]:
    """The runs that have finished an epoch, by preset."""
    groups: dict[str, list[RunNumbers]] = {}
    for run in manifest.runs:
        rows = read_metrics(out / "runs" / run.name)
        if rows:
            groups.setdefault(run.preset, []).append(_numbers(run, rows))
    # a published number holds for the whole recipe on CIFAR-100 only
    exact = manifest.scale == 1.0 and not manifest.changes.keys() - {"data_root", "device"}
    return [
        Group(name, tuple(runs), PUBLISHED.get(name) if exact and _whole(runs) else None)
        for name, runs in groups.items()
    ]


def _whole(runs: Sequence[RunNumbers]) -> bool:
    return all(len(run.curve) == run.run.config.total_epochs for run in runs)


def _numbers(run: PlannedRun, rows: list[dict[str, Any]]) -> RunNumbers:
    curve = tuple(100 * row["test_accuracy"] for row in rows)
    best = max(curve)
    return RunNumbers(
        run,
        best,
        curve.index(best) + 1,
        curve[-1],
        sum(row["seconds"] for row in rows) / 60,
        median(row["train_images_per_s"] for row in rows),
        curve,
    )


def spread(values: list[float]) -> str:
    """ "81.02 +- 0.21" for several seeds, "81.02" for one."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """summary.json of a measurement, or None where it was not made."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else None
