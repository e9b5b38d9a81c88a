"""`lsmha latency`: percentiles of the forms of a model, as lines, JSON and a picture."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._files import atomic_file
from .deploy.latency import Budget, Row, Skipped, measure, summary
from .models import CCT
from .train.run import data_name, load_run, pick_device, read_metrics

OURS, BASELINE = "optimized", "published"


@dataclass(frozen=True)
class LatencyOptions:
    """Choices of `lsmha latency`."""

    batches: tuple[int, ...] = (1, 8, 64, 512)
    dtypes: tuple[str, ...] = ("float32",)
    variants: tuple[str, ...] = (OURS, BASELINE)
    seconds: float = 2.0
    longest_call: float = 10.0
    threads: int | None = None
    cpu_time: bool = False
    device: str = "auto"


def latency_of_model(
    name: str, model: CCT, options: LatencyOptions, out: Path | None
) -> Iterator[str]:
    """Measure a model and write `out`/summary.json; yields lines for people to read."""
    device = pick_device(options.device)
    if options.cpu_time and (device.type != "cpu" or options.threads not in (None, 1)):
        raise ValueError("--cpu-time is of one thread on a CPU; leave out --device and --threads")
    with _threads(1 if options.cpu_time else options.threads):
        rows, skipped = measure(
            model.eval(),
            options.batches,
            [getattr(torch, dtype) for dtype in options.dtypes],
            options.variants,
            device,
            Budget(options.seconds, options.longest_call, options.cpu_time),
            progress=_progress,
        )
        record = summary(rows, skipped, device, shlex.join(["lsmha", *sys.argv[1:]]))
    record["model"] = name
    record["timer"] = "processor time of one thread" if options.cpu_time else "wall clock"
    yield f"{name} on {record['device']}, random images; {record['timer']}; {record['clock']}"
    yield from table(rows, skipped)
    if out is not None:
        path = out / "summary.json"
        with atomic_file(path) as part:
            part.write_text(json.dumps(record, indent=2) + "\n")
        yield f"written: {path}"


def latency_of_runs(folders: Sequence[Path], options: LatencyOptions) -> Iterator[str]:
    """Measure the models of runs, each into RUN/latency, and draw accuracy against latency."""
    runs = [load_run(folder) for folder in folders]
    for run in runs:
        name = f"{run.config.model} ({run.folder.name})"
        yield from latency_of_model(name, run.model, options, run.folder / "latency")
    points = [p for p in map(_point, folders) if p is not None]
    if points:
        path = folders[0] / "latency" / "pareto.png"
        plot_pareto(points, path, ", ".join(sorted({data_name(run.config) for run in runs})))
        yield f"written: {path}"


@contextlib.contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    """PyTorch with so many threads inside the block; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{line:<60}", end="", file=sys.stderr, flush=True)


def table(rows: Sequence[Row], skipped: Sequence[Skipped]) -> Iterator[str]:
    """Lines of a table; the last column is the time over that of the published formulation."""
    base = {(row.dtype, row.batch): row.p50_ms for row in rows if row.variant == BASELINE}
    yield (
        f"{'variant':<20} {'dtype':<9} {'batch':>5} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9} "
        f"{'images/s':>9} {'error':>8} {'/ published':>11}"
    )
    for row in rows:
        ratio = ""
        if (row.dtype, row.batch) in base:
            ratio = f"{row.p50_ms / base[row.dtype, row.batch]:.3f}"
        yield (
            f"{row.variant:<20} {row.dtype:<9} {row.batch:>5} {row.p50_ms:>9.3f} "
            f"{row.p95_ms:>9.3f} {row.p99_ms:>9.3f} {row.images_per_s:>9.1f} {row.error:>8.1e} "
            f"{ratio:>11}"
        )
    for gap in skipped:
        yield f"{gap.variant:<20} {gap.dtype:<9} {gap.batch:>5} not measured: {gap.reason}"


@dataclass(frozen=True)
class Point:
    """A run in the picture of accuracy against latency."""

    name: str
    accuracy: float
    p50_ms: float


def _point(folder: Path) -> Point | None:
    """Best test accuracy and the latency of our form at the smallest batch."""
    accuracies = [row["test_accuracy"] for row in read_metrics(folder) if "test_accuracy" in row]
    record: dict[str, Any] = json.loads((folder / "latency" / "summary.json").read_text())
    rows = [row for row in record["rows"] if row["variant"] == OURS]
    if not accuracies or not rows:
        return None
    first = min(rows, key=lambda row: row["batch"])
    return Point(folder.name, max(accuracies), first["p50_ms"])


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both accuracy and latency, fastest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.p50_ms, -p.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def plot_pareto(points: Sequence[Point], path: Path, data: str) -> None:
    """Draw accuracy on `data` against latency as PNG, the front as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    front = pareto_front(points)
    axes.plot([p.p50_ms for p in front], [100 * p.accuracy for p in front], color="0.6")
    for p in points:
        axes.plot(p.p50_ms, 100 * p.accuracy, "o", label=p.name)
    axes.legend(fontsize=7, frameon=False)
    axes.set_title(data)
    axes.set_xlabel("p50 of one call, smallest batch [ms]")
    axes.set_ylabel("test accuracy [%]")
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=150)
