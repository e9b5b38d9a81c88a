"""What `lsmha committee` prints and writes: lines, a JSON record and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .._files import atomic_folder
from .committee import Committee
from .report import check_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KIND = "lsmha_fast.committee/1"
# told apart by every eye (Okabe and Ito's palette), and by marker and line
_STYLES = {
    "all": ("all subsets", "#0072b2", "o-"),
    "distinct": ("different architectures", "#009e73", "^--"),
    "equal": ("seeds of one architecture", "#d55e00", "s:"),
}


def committee_lines(committee: Committee) -> Iterator[str]:
    """`committee` for people, one fact per line."""
    c = committee
    yield f"accuracy of the members on {c.images} images"
    for name, group, accuracy in zip(c.names, c.groups, c.members, strict=True):
        yield f"  {name} ({group}): {accuracy:.2%}"
    for combination, sizes in c.sizes.items():
        yield f"committees by mean {combination}"
        for s in sizes:
            some = f"{s.measured} of {s.subsets}" if s.measured < s.subsets else str(s.subsets)
            yield (
                f"  {s.size} members, {_STYLES[s.kind][0]} ({some}): mean {s.mean:.2%}, "
                f"{s.lowest:.2%} to {s.highest:.2%}"
            )
        for d in c.comparisons[combination]:
            yield (
                f"  {d.what}: {100 * d.difference:+.2f} points, {c.level:.0%} interval "
                f"{100 * d.low:+.2f} to {100 * d.high:+.2f}, p {d.p_value:.2g}"
            )
    if not any(s.kind == "distinct" for s in c.sizes["logit"]):
        yield "no equal-seed control: give at least two architectures, one of them with two seeds"
    yield (
        f"choices (ours, docs/shp.md): paired bootstrap over images, {c.samples} samples, "
        f"seed {c.seed}; training runs are taken as they are"
    )


def committee_record(committee: Committee) -> dict[str, object]:
    """Plain numbers for JSON."""
    record = committee._asdict()
    for name in ("sizes", "comparisons"):
        by_combination = getattr(committee, name)
        record[name] = {k: [e._asdict() for e in entries] for k, entries in by_combination.items()}
    return record


def write_committee(
    folder: str | Path,
    committee: Committee,
    *,
    title: str,
    origin: Mapping[str, object] | None = None,
) -> list[Path]:
    """Write `summary.json`, `summary.txt` and `committee.png` into a folder, all or nothing.

    Args:
        folder: a new folder, or one that an earlier call made, which is replaced.
        committee: what `soft_committee` gave.
        title: the data set's name, "(generated)" where it is.
        origin: what to keep beside the results, such as the command and versions.

    Returns:
        The files.

    Raises:
        ValueError: the folder exists and holds other files.
    """
    folder = Path(folder)
    check_folder(folder)
    names = ["summary.json", "summary.txt", "committee.png"]
    with atomic_folder(folder) as new:
        plot_committee(committee, title=title).savefig(new / names[2], dpi=120)
        (new / names[1]).write_text("\n".join([title, *committee_lines(committee)]) + "\n")
        record = {"kind": _KIND, "title": title, "files": names, **committee_record(committee)}
        if origin is not None:
            record["origin"] = dict(origin)
        (new / names[0]).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    return [folder / name for name in names]


def plot_committee(committee: Committee, *, title: str) -> Figure:
    """Accuracy against the number of members, one panel per combination."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, len(committee.sizes), sharey=True)
    for ax, (combination, entries) in zip(axes, committee.sizes.items(), strict=True):
        for kind, (label, color, style) in _STYLES.items():
            found = [e for e in entries if e.kind == kind]
            if not found:
                continue
            x = [e.size for e in found]
            ax.plot(x, [100 * e.mean for e in found], style, color=color, label=label)
            if kind == "all":
                low, high = ([100 * getattr(e, f) for e in found] for f in ("lowest", "highest"))
                ax.fill_between(x, low, high, color=color, alpha=0.15, label="lowest to highest")
        ax.set_title(f"mean {combination}", fontsize=9)
        ax.set_xlabel("members", fontsize=8)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.tick_params(labelsize=7)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[0].set_ylabel("accuracy, %", fontsize=8)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{title}: soft committees of {len(committee.names)} networks", fontsize=10)
    return figure
