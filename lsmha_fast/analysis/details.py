"""What stands beside the numbers of a block: sweep, intervals, sharing out, null model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .bootstrap import SNRIntervals, bootstrap_snr
from .clusters import Clusters
from .null import NullModel, Numbers, null_lines
from .shp import SHP
from .sweep import THRESHOLDS, Sweep, sweep_threshold
from .symmetry import Symmetry, symmetry_breaking, symmetry_lines, symmetry_record


class BlockDetails(NamedTuple):
    """Of one block."""

    sweep: Sweep
    intervals: SNRIntervals
    symmetry: Symmetry
    null: dict[str, list[Numbers]]  # empty where no null model was measured

    def lines(self) -> list[str]:
        """For people, without line ends."""
        low, high = self.intervals.mean_snr
        plain_low, plain_high = self.intervals.mean_unclipped
        return [
            f"  SNR {self.intervals.level:.0%} of bootstrap over heads: {low:.2f} to {high:.2f} "
            f"(without threshold {plain_low:.2f} to {plain_high:.2f})",
            *null_lines(self.null),
            *symmetry_lines(self.symmetry),
            *self.sweep.lines(),
        ]

    def record(self) -> dict[str, object]:
        """For JSON: plain numbers, None where a ratio is infinite."""
        intervals = {
            "level": self.intervals.level,
            "samples": self.intervals.samples,
            "seed": self.intervals.seed,
            "snr": _finite(self.intervals.mean_snr),
            "snr_unclipped": _finite(self.intervals.mean_unclipped),
            "snr_by_label": [_finite(pair) for pair in self.intervals.snr.tolist()],
            "snr_unclipped_by_label": [_finite(p) for p in self.intervals.unclipped.tolist()],
        }
        return {
            "bootstrap": intervals,
            "null": self.null,
            "symmetry": symmetry_record(self.symmetry),
            "sweep": self.sweep.record(),
        }


def measure_details(
    shp: SHP,
    clusters: Sequence[Clusters],
    *,
    null: NullModel | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    samples: int = 1000,
    seed: int = 0,
) -> list[BlockDetails]:
    """Threshold sweep, bootstrap intervals, symmetry breaking and null numbers of every block.

    Args:
        shp: what was measured.
        clusters: one per block; their threshold and normalisation hold for the null model too.
        null: what `measure_null` gave, or None.
        thresholds: of the sweep.
        samples: of the bootstrap.
        seed: of bootstrap and chance overlap.

    Returns:
        One per block.
    """
    details = []
    for m, found in enumerate(clusters):
        matrices, normalize = shp.matrices[m], found.normalize
        details.append(
            BlockDetails(
                sweep_threshold(matrices, thresholds, normalize=normalize),
                bootstrap_snr(matrices, found, samples=samples, seed=seed),
                symmetry_breaking(matrices, found, seed=seed),
                null.numbers(m, threshold=found.threshold, normalize=normalize) if null else {},
            )
        )
    return details


def _finite(pair: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in pair]
