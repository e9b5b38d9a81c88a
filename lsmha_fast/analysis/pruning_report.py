"""The folder `lsmha prune` leaves: summary, arrays and a picture.

`summary.json` is one object:

| key | value |
|---|---|
| kind, title, files | "lsmha_fast.prune/1", what was pruned, the files of the folder |
| criterion | "shp" (heads), "andc" or "afcc" (connections) |
| split, choice_split | where accuracies are measured; the images the choice was made on |
| rows | a list of objects, one per pruned model, below |
| target | `removed` of the model that was saved |
| choices | options behind the numbers, ours |
| command, versions | what was typed; versions by package |

A row is one pruned model: `method` ("shp", "andc", "afcc", or a control: "magnitude", "random"),
`seed` (of random, else null), `removed` (heads or connections), `total` (of those there
were), `kept_per_block` (list), `accuracy_before`, `accuracy_after`, `accuracy_finetuned` (0..1;
null where not fine-tuned), `ms_before`, `ms_after` (per batch; null where not timed),
`macs_before`, `macs_after` (of one image; connections that are zero are not counted),
`uncovered` (labels that lost their heads, added over blocks; null for connections), and
`threshold` of clusters. Infinite or missing numbers are null.

`prune.npz` holds `kept.<row>`: Boolean, all heads of block 1, then of block 2, and so on; for
connections the masks of `fc` (andc), and of every block's matrices, each flattened row by row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .._files import atomic_folder
from ._io import save_npz
from .report import check_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KIND = "lsmha_fast.prune/1"
_UNITS = {"shp": "heads", "andc": "connections", "afcc": "connections"}
# told apart by every eye (Okabe and Ito's palette), and by marker and line
_CONTROLS = {"magnitude": ("#d55e00", "s--"), "random": ("#009e73", "^:")}


class PruningRow(NamedTuple):
    """One pruned model, see the table above."""

    method: str
    seed: int | None
    removed: int
    total: int
    kept_per_block: tuple[int, ...]
    accuracy_before: float
    accuracy_after: float
    accuracy_finetuned: float | None
    ms_before: float | None
    ms_after: float | None
    macs_before: int
    macs_after: int
    uncovered: int | None
    threshold: float


class Pruning(NamedTuple):
    """What `lsmha prune` measured."""

    criterion: str
    split: str
    choice_split: str
    rows: tuple[PruningRow, ...]
    kept: tuple[np.ndarray, ...]  # per row, Boolean
    target: int
    choices: dict[str, object]
    command: str
    versions: dict[str, str]

    @property
    def units(self) -> str:
        """What is removed, in the plural."""
        return _UNITS[self.criterion]


def pruning_lines(pruning: Pruning) -> Iterator[str]:
    """`pruning` for people: one line per number of removed units and method."""
    p = pruning
    yield f"accuracy on the {p.split} split; chosen on {p.choice_split}"
    for removed, rows in _by_removed(p.rows).items():
        total, first = rows[0].total, rows[0]
        share = f"{removed / total:.0%}" if total else "none"
        saved = 1 - first.macs_after / first.macs_before
        cut = "" if p.criterion == "shp" else f" at threshold {first.threshold:g}"
        yield f"  {removed} of {total} {p.units} removed ({share}){cut}, {saved:.1%} fewer MACs"
        for method in dict.fromkeys(row.method for row in rows):
            yield f"    {_method_text(method, [row for row in rows if row.method == method])}"
    yield "choices (ours, docs/pruning.md): " + ", ".join(f"{k} {v}" for k, v in p.choices.items())


def _method_text(method: str, rows: Sequence[PruningRow]) -> str:
    after = [row.accuracy_after for row in rows]
    text = f"{method}: accuracy {rows[0].accuracy_before:.2%} -> {_span(after)}"
    tuned = [row.accuracy_finetuned for row in rows if row.accuracy_finetuned is not None]
    if tuned:
        text += f", fine-tuned {_span(tuned)}"
    if rows[0].ms_before is not None and rows[0].ms_after is not None:
        text += f"; {rows[0].ms_before:.2f} -> {rows[0].ms_after:.2f} ms"
    lost = [row.uncovered for row in rows if row.uncovered is not None]
    if lost:
        text += f"; {sum(lost) / len(lost):.3g} labels lose their heads"
    return text


def _span(values: Sequence[float]) -> str:
    """The mean, and the range where there are several."""
    text = f"{sum(values) / len(values):.2%}"
    if len(values) > 1:
        text += f" ({min(values):.2%} to {max(values):.2%}, {len(values)} seeds)"
    return text


def _by_removed(rows: Sequence[PruningRow]) -> dict[int, list[PruningRow]]:
    groups: dict[int, list[PruningRow]] = {}
    for row in sorted(rows, key=lambda row: row.removed):
        groups.setdefault(row.removed, []).append(row)
    return groups


def write_pruning(folder: str | Path, pruning: Pruning, *, title: str) -> list[Path]:
    """Write `summary.json`, `summary.txt`, `prune.npz` and `prune.png`, all or nothing.

    Args:
        folder: a new folder, or one that an earlier call made, which is replaced.
        pruning: what was measured.
        title: the data set's name, "(generated)" where it is, and the model's.

    Returns:
        The files.

    Raises:
        ValueError: the folder exists and holds other files.
    """
    folder = Path(folder)
    check_folder(folder)
    names = ["summary.json", "summary.txt", "prune.npz", "prune.png"]
    record = {"kind": _KIND, "title": title, "files": names, **pruning._asdict()}
    record["rows"] = [row._asdict() for row in pruning.rows]
    del record["kept"]
    with atomic_folder(folder) as new:
        plot_pruning(pruning, title=title).savefig(new / "prune.png", dpi=120)
        arrays = {f"kept.{n}": kept for n, kept in enumerate(pruning.kept)}
        save_npz(new / "prune.npz", arrays, {"kind": _KIND, "criterion": pruning.criterion})
        (new / "summary.txt").write_text("\n".join([title, *pruning_lines(pruning)]) + "\n")
        text = json.dumps(record, indent=1, allow_nan=False)
        (new / "summary.json").write_text(text + "\n")
    return [folder / name for name in names]


def plot_pruning(pruning: Pruning, *, title: str) -> Figure:
    """Accuracy against the share of removed units, the criterion beside its controls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    before = {0.0: [pruning.rows[0].accuracy_before]}
    styles = {pruning.criterion: ("#0072b2", "o-"), **_CONTROLS}
    for method, (color, style) in styles.items():
        points = dict(before)
        for row in pruning.rows:
            if row.method == method and row.removed:
                points.setdefault(row.removed / row.total, []).append(row.accuracy_after)
        x = sorted(points)
        mean = [100 * sum(points[share]) / len(points[share]) for share in x]
        label = f"{method} ({pruning.units})" if method == pruning.criterion else method
        ax.plot([100 * share for share in x], mean, style, color=color, label=label, markersize=4)
        low, high = ([100 * f(points[share]) for share in x] for f in (min, max))
        if low != high:
            ax.fill_between([100 * share for share in x], low, high, color=color, alpha=0.15)
    tuned = [row for row in pruning.rows if row.accuracy_finetuned is not None]
    for row in tuned:
        share, accuracy = 100 * row.removed / row.total, 100 * (row.accuracy_finetuned or 0)
        color = styles[row.method][0]
        label = "fine-tuned" if row is tuned[0] else "_"  # once in the legend
        ax.plot(share, accuracy, "*", color=color, markersize=9, label=label)
    ax.set_xlabel(f"{pruning.units} removed, %", fontsize=9)
    ax.set_ylabel(f"accuracy on the {pruning.split} split, %", fontsize=9)
    ax.tick_params(labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.legend(fontsize=8)
    figure.suptitle(f"{title}: pruned by {pruning.criterion}, without training after", fontsize=10)
    return figure
