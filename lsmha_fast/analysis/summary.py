"""What was measured, as short lines of text and as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .clusters import Clusters
from .probes import Probes
from .shp import SHP
from .snr import SNR

if TYPE_CHECKING:
    from .details import BlockDetails


def summarize(
    probes: Probes,
    shp: SHP,
    clusters: Sequence[Clusters],
    snrs: Sequence[SNR],
    details: Sequence[BlockDetails] | None = None,
    *,
    max_heads: int = 8,
    width: int = 100,
) -> list[str]:
    """Describe the blocks and what their heads recognise, one fact per line.

    Args:
        probes, shp: what was measured.
        clusters, snrs: one per block.
        details: what `measure_details` gave, one per block.
        max_heads: heads to list per block; those that recognise most labels come first.
        width: longest line for a head, in characters.

    Returns:
        Lines without line ends.
    """
    lines = []
    for m, (found, snr) in enumerate(zip(clusters, snrs, strict=True)):
        lines += _block_lines(probes, shp, m, found, snr)
        if details is not None:
            lines += details[m].lines()
        # a stable sort: among equals, lower head numbers first
        ranked = sorted(range(len(found.number)), key=lambda h: -int(found.recognized[h].sum()))
        lines += [
            f"  {head_text(found, h, shp.class_names, width - 2)}" for h in ranked[:max_heads]
        ]
        if len(ranked) > max_heads:
            lines.append(f"  ... and {len(ranked) - max_heads} more heads")
    empty = int((shp.counts == 0).sum())
    if empty:
        lines.append(f"{empty} labels have no images: no head can recognise them, their SNR is 0")
    if probes.model_accuracy is not None:
        lines.append(f"whole model: accuracy {probes.model_accuracy:.2%}")
    return [*lines, choices_text(shp, clusters[0])]


def _block_lines(probes: Probes, shp: SHP, m: int, found: Clusters, snr: SNR) -> list[str]:
    numbers = block_numbers(found, snr)
    accuracy = "" if probes.accuracy is None else f" accuracy {probes.accuracy[m]:.2%},"
    return [
        f"{shp.block_names[m]} ({numbers['heads']} heads):{accuracy} SNR {snr.mean_snr:.2f} "
        f"(without threshold {snr.mean_unclipped:.2f})",
        f"  per head {numbers['clusters']:.2f} clusters of {numbers['cluster_size']:.2f} labels, "
        f"noise {numbers['internal_noise']:.2f} internal, {numbers['external_noise']:.2f} external"
        f"; per label {snr.mean_signal:.2f} heads (fewest {int(snr.signal.min())})",
    ]


def head_text(clusters: Clusters, head: int, names: Sequence[str], width: int) -> str:
    """One line: "head 3: cat+dog, ship"; labels of one cluster are joined by "+"."""
    groups = ["+".join(names[i] for i in cluster) for cluster in clusters.labels(head)]
    text, start = f"head {head + 1}: ", len(f"head {head + 1}: ")
    for done, group in enumerate(groups):
        more = f", {len(groups) - done}\u00a0more"  # one word for line breaks
        if done and len(text) + len(group) + len(more) + 2 > width:
            return text + more
        text += (", " if len(text) > start else "") + group
    return text if groups else text + "nothing"


def choices_text(shp: SHP, clusters: Clusters) -> str:
    """One line: the choices behind the numbers, which are ours and not the paper's."""
    options = choices(shp, clusters)
    return "choices (ours, docs/shp.md): " + ", ".join(f"{k} {v}" for k, v in options.items())


def choices(shp: SHP, clusters: Clusters) -> dict[str, object]:
    """The options behind the numbers."""
    return {
        "pooling": shp.pooling,
        "bias": shp.bias,
        "layer_norm": shp.layer_norm,
        "threshold": clusters.threshold,
        "normalize": clusters.normalize,
    }


def mean_size(clusters: Clusters) -> float:
    """Labels per cluster, averaged over the heads that have one; 0 if none has."""
    with_clusters = clusters.mean_size[clusters.number > 0]
    return float(with_clusters.mean()) if len(with_clusters) else 0.0


def block_numbers(clusters: Clusters, snr: SNR) -> dict[str, float | int | None]:
    """The averages of one block; a ratio without noise is None."""
    means = {
        "clusters": clusters.number,
        "internal_noise": clusters.internal_noise,
        "external_noise": clusters.external_noise,
        "column_noise": clusters.column_noise,
        "rest_noise": clusters.rest_noise,
        "density": clusters.density,
    }
    numbers = {name: float(values.double().mean()) for name, values in means.items()}
    ratios = {
        "heads_per_label": snr.mean_signal,
        "noise_per_pair": snr.mean_noise,
        "snr": snr.mean_snr,
        "snr_unclipped": snr.mean_unclipped,
    }
    return {
        "heads": len(clusters.number),
        "cluster_size": mean_size(clusters),
        **numbers,
        **{name: value if math.isfinite(value) else None for name, value in ratios.items()},
    }
