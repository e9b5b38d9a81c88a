"""How the numbers of a block depend on the threshold, which is our choice and not the paper's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from .clusters import find_clusters
from .snr import signal_to_noise
from .summary import block_numbers

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_SHOWN = {
    "clusters": "N_c",
    "cluster_size": "C_s",
    "internal_noise": "n_i",
    "external_noise": "n_e",
    "snr": "SNR",
}


class Sweep(NamedTuple):
    """All numbers of one block at every threshold."""

    thresholds: tuple[float, ...]
    numbers: tuple[dict[str, float | int | None], ...]  # `block_numbers` of each threshold
    normalize: str

    def lines(self) -> Iterator[str]:
        """A small table, one line per threshold."""
        yield "  threshold " + "".join(f"{title:>9}" for title in _SHOWN.values())
        for threshold, numbers in zip(self.thresholds, self.numbers, strict=True):
            yield f"  {threshold:9g} " + "".join(_cell(numbers[name]) for name in _SHOWN)

    def record(self) -> dict[str, object]:
        """Plain lists for JSON, one value per threshold; None is a ratio without noise."""
        names = self.numbers[0]
        return {
            "thresholds": list(self.thresholds),
            "normalize": self.normalize,
            **{name: [numbers[name] for numbers in self.numbers] for name in names},
        }


def sweep_threshold(
    matrices: Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    normalize: str = "matrix",
) -> Sweep:
    """Clusters, noise and signal-to-noise of one block at several thresholds.

    Args:
        matrices: fields of the block, (H, K, K).
        thresholds: each in (0, 1], at least one.
        normalize: as in `find_clusters`.

    Returns:
        Numbers of the block at each threshold.

    Raises:
        ValueError: no threshold, or what `find_clusters` and `signal_to_noise` refuse.
    """
    if not thresholds:
        raise ValueError("no thresholds to sweep; give at least one in (0, 1]")
    numbers = []
    for threshold in thresholds:
        found = find_clusters(matrices, threshold=threshold, normalize=normalize)
        numbers.append(block_numbers(found, signal_to_noise(matrices, found)))
    return Sweep(tuple(map(float, thresholds)), tuple(numbers), normalize)


def _cell(value: float | int | None) -> str:
    return f"{'inf' if value is None else format(value, '.2f'):>9}"
