"""Pictures of the SHP: matrices of heads, who recognises what, accuracy and SNR by depth.

matplotlib is imported inside the functions and without pyplot, so that no window and no global
state is involved.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .clusters import Clusters
from .probes import Probes
from .shp import SHP
from .snr import SNR
from .summary import head_text, mean_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# as many class names fit along an axis
NAMED_CLASSES = 24
BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart by every eye (Okabe and Ito's palette)


def plot_shp(
    folder: str | Path,
    probes: Probes,
    shp: SHP,
    clusters: Sequence[Clusters],
    snrs: Sequence[SNR],
    *,
    title: str,
) -> list[Path]:
    """Draw all pictures into a folder as PNG.

    Args:
        folder: an existing folder.
        probes, shp: what was measured.
        clusters, snrs: one per block.
        title: what the pictures are of, with the data set's name, "(generated)" where it is.

    Returns:
        The files: `heads_<block>.png` per block, `labels_by_head.png`, `depth.png`.
    """
    figures = {
        f"heads_{_slug(name)}": plot_heads(shp, m, clusters[m], title=title)
        for m, name in enumerate(shp.block_names)
    }
    figures["labels_by_head"] = plot_labels_by_head(shp, clusters, title=title)
    figures["depth"] = plot_depth(probes, clusters, snrs, title=title)
    paths = []
    for name, figure in figures.items():
        paths.append(Path(folder) / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def plot_heads(
    shp: SHP, block: int, clusters: Clusters, *, title: str, heads: Sequence[int] | None = None
) -> Figure:
    """SHP matrices of some heads of one block, permuted so that clusters are diagonal blocks.

    Args:
        shp: the matrices.
        block: number of the block, from 0.
        clusters: of this block.
        title: first line of the picture.
        heads: numbers of the heads to show, from 0; by default up to 16, evenly spaced.
    """
    from matplotlib.figure import Figure

    matrices = shp.matrix(block)
    H = len(matrices)
    heads = _evenly(H, 16) if heads is None else list(heads)
    columns = min(4, len(heads))
    rows = -(-len(heads) // columns)
    figure = Figure(figsize=(max(2.9 * columns + 0.9, 6.5), 3.05 * rows + 1), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(heads) :]:
        ax.set_visible(False)
    for ax, head in zip(axes, heads, strict=False):
        image = _draw_matrix(ax, matrices[head], clusters, head, shp.class_names)
    figure.colorbar(
        image, ax=axes.tolist(), shrink=0.5, aspect=30, extend="min", label="field / largest field"
    )
    K = len(shp.class_names)
    some = f"{len(heads)} of {H} heads" if len(heads) < H else f"all {H} heads"
    part = "" if K <= NAMED_CLASSES else f" (those with the largest fields of {K})"
    figure.suptitle(
        f"{title}\nSHP of {shp.block_names[block]}, {some}: field of each output (across) for "
        f"images of each label (down)\nlabels reordered for each head{part}; boxes: clusters, "
        f"mutual fields at least {clusters.threshold:g} of the largest",
        fontsize=10,
    )
    return figure


def _draw_matrix(ax: Axes, matrix: Tensor, clusters: Clusters, head: int, names: Sequence[str]):
    from matplotlib.patches import Rectangle

    fields = matrix / matrix.max().clamp(min=torch.finfo(matrix.dtype).tiny)
    order = _shown_labels(fields, clusters, head)
    shown = fields[order][:, order].numpy()
    image = ax.imshow(shown, cmap="coolwarm", vmin=-1, vmax=1, interpolation="nearest")
    start = 0
    for cluster in clusters.labels(head):
        corner, size = (start - 0.5, start - 0.5), len(cluster)
        ax.add_patch(Rectangle(corner, size, size, fill=False, edgecolor="black", linewidth=1.6))
        start += size
    text = head_text(clusters, head, [n.replace(" ", "\u00a0") for n in names], width=72)
    lines = textwrap.wrap(text, 46, break_on_hyphens=False)
    ax.set_title("\n".join(lines[:2]), fontsize=8, loc="left")
    if len(order) <= NAMED_CLASSES:
        labels = [_short(names[i]) for i in order.tolist()]
        ax.set_xticks(range(len(order)), labels, rotation=90, fontsize=6)
        ax.set_yticks(range(len(order)), labels, fontsize=6)
    else:
        ax.set_xticks([])
        ax.set_yticks([])
    ax.tick_params(length=0)
    return image


def _shown_labels(fields: Tensor, clusters: Clusters, head: int) -> Tensor:
    """The clusters' labels, then the others: all, or of many those with the largest fields."""
    order = clusters.order[head]
    if len(order) <= NAMED_CLASSES:
        return order
    inside = int(clusters.recognized[head].sum())
    others = order[inside:]
    largest = torch.maximum(fields.amax(0), fields.amax(1))[others]
    others = others[largest.argsort(descending=True, stable=True)]
    return torch.cat([order[:inside], others])[: max(NAMED_CLASSES, inside)]


def plot_labels_by_head(shp: SHP, clusters: Sequence[Clusters], *, title: str) -> Figure:
    """For every block: which head recognises which label, and how many heads a label has."""
    from matplotlib.figure import Figure

    depth, K = len(clusters), len(shp.class_names)
    height = min(max(2.2, 0.2 * K), 4.0) + 0.45
    figure = Figure(figsize=(9, height * depth + 0.8), layout="constrained")
    axes = figure.subplots(depth, 2, squeeze=False, sharey="row", width_ratios=(6, 1))
    most = max(int(c.recognized.sum(0).max()) for c in clusters)
    for m, (wide, narrow) in enumerate(axes):
        image = _draw_label_map(wide, shp, m, clusters[m])
        per_label = clusters[m].recognized.sum(0)
        narrow.barh(range(K), per_label.numpy(), color=BLUE, height=0.8)
        narrow.set_title("heads per label", fontsize=8)
        narrow.tick_params(labelsize=7, left=False)
        narrow.set_xlim(0, max(most, 1))
        narrow.xaxis.get_major_locator().set_params(integer=True)
        for side in ("top", "right"):
            narrow.spines[side].set_visible(False)
    figure.colorbar(
        image, ax=axes.ravel().tolist(), shrink=min(1.0, 0.9 / depth**0.5), aspect=30,
        label="field of the label on its own output / largest field",
    )  # fmt: skip
    figure.suptitle(f"{title}\nlabels that each head recognises (blank: none)", fontsize=10)
    return figure


def _draw_label_map(ax: Axes, shp: SHP, block: int, clusters: Clusters):
    matrices = shp.matrix(block)
    H, K, _ = matrices.shape
    largest = matrices.amax((1, 2)).clamp(min=torch.finfo(matrices.dtype).tiny)
    own = matrices.diagonal(dim1=1, dim2=2) / largest[:, None]
    shown = torch.where(clusters.recognized, own, torch.nan).T  # (K, H)
    least = clusters.threshold if clusters.normalize == "matrix" else 0.0
    image = ax.imshow(
        shown.numpy(), cmap="viridis_r", vmin=least, vmax=1, aspect="auto", interpolation="nearest"
    )
    ax.set_title(f"{shp.block_names[block]}, {H} heads", fontsize=9, loc="left")
    ax.set_xlabel("head", fontsize=8)
    if H <= 48:
        ax.set_xticks(range(H), [str(h + 1) for h in range(H)], fontsize=6)
    else:
        marks = [0, *range(9, H, 10 if H <= 128 else 20)]
        ax.set_xticks(marks, [str(h + 1) for h in marks], fontsize=6)
    if K <= NAMED_CLASSES:
        ax.set_yticks(range(K), [_short(n) for n in shp.class_names], fontsize=7)
    else:
        ax.tick_params(axis="y", labelsize=6)
        ax.set_ylabel("label", fontsize=8)
    ax.set_facecolor("#f2f2f2")
    return image


def plot_depth(
    probes: Probes, clusters: Sequence[Clusters], snrs: Sequence[SNR], *, title: str
) -> Figure:
    """Accuracy, SNR and clusters of every block, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    accuracy, ratio, count = figure.subplots(1, 3)
    blocks = range(len(clusters))
    if probes.accuracy is not None and probes.model_accuracy is not None:
        percent = [100 * a for a in (*probes.accuracy, probes.model_accuracy)]
        accuracy.plot(blocks, percent[:-1], "o-", color=BLUE, label="probe of the block")
        accuracy.axhline(percent[-1], color=ORANGE, linestyle="--", label="whole model")
        accuracy.legend(fontsize=7)
        # a span below five points would make noise look like a trend
        middle = (min(percent) + max(percent)) / 2
        span = max(5.0, 1.2 * (max(percent) - min(percent)))
        accuracy.set_ylim(middle - span / 2, middle + span / 2)
    accuracy.set_title("accuracy on held-out images, %", fontsize=9)
    _plot_ratios(ratio, probes.block_names, snrs)
    number = [c.number.double().mean().item() for c in clusters]
    count.plot(blocks, number, "o-", color=BLUE, label="clusters per head")
    count.plot(blocks, [mean_size(c) for c in clusters], "s--", color=ORANGE, label="labels each")
    count.set_title("clusters", fontsize=9)
    count.set_ylim(bottom=0)
    count.legend(fontsize=7)
    for ax in (accuracy, ratio, count):
        ax.set_xticks(blocks, probes.block_names, fontsize=7, rotation=30, ha="right")
        ax.tick_params(axis="y", labelsize=7)
        ax.margins(x=0.1)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure


def _plot_ratios(ax: Axes, names: Sequence[str], snrs: Sequence[SNR]) -> None:
    clipped, plain = ([s.mean_snr for s in snrs], [s.mean_unclipped for s in snrs])
    ax.plot(range(len(snrs)), clipped, "o-", color=BLUE, label="SNR (above threshold)")
    ax.plot(range(len(snrs)), plain, "s--", color=ORANGE, label="SNR* (plain fields)")
    shown = [r for r in (*clipped, *plain) if 0 < r < math.inf]
    if shown and max(shown) > 20 * min(shown):
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    silent = [name for name, r in zip(names, clipped, strict=True) if r == math.inf]
    note = f"\nno noise above threshold in {', '.join(silent)}" if silent else ""
    ax.set_title(f"signal-to-noise ratio{note}", fontsize=9)
    ax.legend(fontsize=7)


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` numbers of 0 .. count - 1, evenly spaced."""
    return [i * count // min(count, most) for i in range(min(count, most))]


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_")
