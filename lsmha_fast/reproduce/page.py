"""One page of tables: markdown for documents, the same words on the terminal."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from .manifests import Manifest, PlannedRun
from .results import Group, read_summary, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LATENCY_BATCHES = (1, 64)
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the epochs, in the table of early learning


def write_page(
    manifest: Manifest,
    out: Path,
    groups: Sequence[Group],
    *,
    data: str,
    device: str,
    command: str,
    unfinished: Sequence[str],
) -> list[str]:
    """Lines of the page, in markdown.

    Args:
        manifest: what was planned.
        out: its folder, where the measurements lie.
        groups: what was trained.
        data: name of the data set, "(generated)" where it is.
        device: where it ran.
        command: what was typed.
        unfinished: runs that did not come to an end.
    """
    lines = [f"# {manifest.title}", ""]
    lines += _conditions(manifest, data, device, command)
    if unfinished:
        lines += [
            "",
            f"**Not finished: {', '.join(unfinished)}.** Numbers of such a run are those so far.",
        ]
    lines += ["", "## Accuracy", "", *_accuracy(groups)]
    if any(len(group.curve) > 1 for group in groups):
        lines += ["", "## Learning over the epochs", "", *_learning(groups)]
        lines += ["", "![test accuracy by epoch](curves.png)"]
    lines += ["", "## Probes and single-head performance", "", *_shp(manifest, out)]
    lines += ["", "## Soft committee", "", *_committee(out)]
    lines += ["", "## Latency", "", *_latency(manifest, out)]
    return [*lines, ""]


def _conditions(manifest: Manifest, data: str, device: str, command: str) -> list[str]:
    config = manifest.runs[0].config
    lines = [f"Data: {data}. Device: {device}.", "", f"    {command}", ""]
    if manifest.scale < 1:
        lines.append(
            f"**Shortened to {manifest.scale:g} of the recipe**: {config.epochs} epochs and "
            f"{config.cooldown_epochs} of cool-down, {config.warmup_epochs:.3g} of warm-up, the "
            "learning rate changed every step. These are not the numbers of the full recipe."
        )
    if manifest.changes:
        changes = ", ".join(f"{key} {value}" for key, value in manifest.changes.items())
        lines.append(f"Different from the presets in every run: {changes}.")
    if config.data != "cifar100":
        lines.append(
            "These are not CIFAR-100 numbers, and no published number belongs beside them."
        )
    return lines


def _accuracy(groups: Sequence[Group]) -> list[str]:
    rows = []
    for group in groups:
        config = group.runs[0].run.config
        hybrid = f"{config.conv_blocks} {config.conv_form}" if config.conv_blocks else "0"
        runs = group.runs
        rows.append(
            [
                group.preset,
                hybrid,
                len(runs),
                _epochs(group),
                spread([run.best for run in runs]),
                ", ".join(str(run.best_epoch) for run in runs),
                spread([run.last for run in runs]),
                "-" if group.published is None else f"{group.published:.2f} [1]",
                f"{mean(run.images_per_s for run in runs):,.0f}",
                f"{mean(run.minutes for run in runs):.1f}",
            ]
        )
    head = ["preset", "convolution blocks", "seeds", "epochs", "best, %", "at epoch", "last, %"]
    lines = table([*head, "published, %", "images/s", "minutes"], rows)
    lines += ["", "Test accuracy; ± is the standard deviation over the seeds."]
    if any(group.published for group in groups):
        lines.append("[1] best epoch, README of SHI-Labs/Compact-Transformers (arXiv 2104.05704).")
    return lines


def _epochs(group: Group) -> str:
    """ "310", or "12 of 310" where a run is not finished."""
    total = group.runs[0].run.config.total_epochs
    done = min(len(run.curve) for run in group.runs)
    return str(total) if done == total else f"**{done} of {total}**"


def _learning(groups: Sequence[Group]) -> list[str]:
    """Accuracy at shares of the run, mean over the seeds."""
    epochs = max(len(group.curve) for group in groups)
    at = sorted({max(1, round(share * epochs)) for share in SHARES})
    rows = [
        [group.preset, *(f"{group.curve[e - 1]:.2f}" if e <= len(group.curve) else "-" for e in at)]
        for group in groups
    ]
    return table(["test accuracy, %", *(f"epoch {e}" for e in at)], rows)


def _shp(manifest: Manifest, out: Path) -> list[str]:
    rows = []
    for run in first_seeds(manifest, manifest.shp):
        summary = read_summary(out / "runs" / run.name / "shp")
        for block in summary["blocks"] if summary else []:
            rows.append([run.name, block["name"], block["heads"], *_block(block)])
    if not rows:
        return ["Not measured."]
    head = ["run", "block", "heads", "probe accuracy, %", "SNR", "clusters per head"]
    return table([*head, "labels per cluster", "heads per label"], rows)


def _block(block: dict[str, Any]) -> list[str]:
    keys = ("snr", "clusters", "cluster_size", "heads_per_label")
    numbers = ["-" if block[key] is None else f"{block[key]:.2f}" for key in keys]
    return [f"{100 * block['accuracy']:.2f}", *numbers]


def first_seeds(manifest: Manifest, presets: Container[str]) -> list[PlannedRun]:
    """The first run of each of these presets."""
    runs = {run.preset: run for run in reversed(manifest.runs)}
    return [run for run in manifest.runs if run.preset in presets and run is runs[run.preset]]


def _latency(manifest: Manifest, out: Path) -> list[str]:
    """Milliseconds of a call in our inference form and in the published one."""
    rows = []
    for run in first_seeds(manifest, {run.preset for run in manifest.runs}):
        summary = read_summary(out / "runs" / run.name / "latency")
        if summary is not None:
            p50 = {(r["variant"], r["batch"]): f"{r['p50_ms']:.3f}" for r in summary["rows"]}
            keys = [(v, b) for b in LATENCY_BATCHES for v in ("optimized", "published")]
            rows.append([run.name, *(p50.get(key, "-") for key in keys)])
    if not rows:
        return ["Not measured."]
    heads = [f"{v}, batch {b}" for b in LATENCY_BATCHES for v in ("ours", "published form")]
    return table(["p50, ms", *heads], rows)


def _committee(out: Path) -> list[str]:
    summary = read_summary(out / "committee")
    if summary is None:
        return ["Not measured: it needs two finished runs."]
    rows = [
        [combination, s["size"], s["kind"], s["measured"], f"{100 * s['mean']:.2f}"]
        for combination, sizes in summary["sizes"].items()
        for s in sizes
    ]
    lines = table(["mean of", "members", "kind", "committees", "accuracy, %"], rows)
    gains = [
        f"{combination}: {c['what']}: {100 * c['difference']:+.2f} points "
        f"({100 * c['low']:+.2f} to {100 * c['high']:+.2f})"
        for combination, comparisons in summary["comparisons"].items()
        for c in comparisons
    ]
    return [*lines, "", *(f"- {gain}" for gain in gains)]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A markdown table whose columns also line up in plain text."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def plot_curves(groups: Sequence[Group], title: str) -> Figure:
    """Test accuracy by epoch, a line per preset, thin lines for its seeds."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    colors = colormaps["viridis"].resampled(max(len(groups), 2) + 1)
    for i, group in enumerate(groups):
        epochs = range(1, len(group.curve) + 1)
        ax.plot(epochs, group.curve, "o-", ms=3, color=colors(i), label=group.preset)
        for run in group.runs if len(group.runs) > 1 else ():
            ax.plot(epochs, run.curve, color=colors(i), lw=0.6, alpha=0.5)
    ax.set(xlabel="epoch", ylabel="test accuracy, %", title=title)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=8)
    return figure
