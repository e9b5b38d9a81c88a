"""Bootstrap intervals of signal-to-noise ratios: how far they hang on single heads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .clusters import Clusters
from .snr import check_fields, ratio, unclipped_ratio, wrong_answers

# numbers of one chunk of resampled field matrices
_CHUNK = 8_000_000


class SNRIntervals(NamedTuple):
    """Percentile intervals of the fields of `SNR` of the same names; last dim: low, high."""

    snr: Tensor  # (K, 2)
    mean_snr: tuple[float, float]
    unclipped: Tensor  # (K, 2)
    mean_unclipped: tuple[float, float]
    level: float
    samples: int
    seed: int


def bootstrap_snr(
    matrices: Tensor,
    clusters: Clusters,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> SNRIntervals:
    """Percentile bootstrap of one block's signal-to-noise ratios over its heads.

    Signal, noise and summed fields are sums over heads, so a bootstrap sample is a block of H heads
    drawn with replacement. It answers how much the ratio owes to a few heads; images are not drawn
    again. With one head every sample is the block itself.

    Args:
        matrices, clusters: as for `signal_to_noise`.
        samples: bootstrap samples.
        level: of the intervals, in (0, 1).
        seed: the same seed gives the same intervals.

    Returns:
        Intervals whose ends are values that occur: ratios without noise are infinite.

    Raises:
        ValueError: fewer than one sample, a level outside (0, 1), and what
            `signal_to_noise` refuses.
    """
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"need samples >= 1 and a level in (0, 1), got {samples=} {level=}")
    fields = check_fields(matrices, clusters)
    H, K, _ = fields.shape
    random = np.random.default_rng(seed)
    weights = torch.from_numpy(random.multinomial(H, np.full(H, 1 / H), size=samples)).double()
    signal = weights @ clusters.recognized.double()  # (samples, K)
    noise = weights @ wrong_answers(clusters).sum(1).double()  # (samples, K), by output
    means = ratio(signal.mean(1), noise.sum(1) / (K * (K - 1)))
    step = max(1, _CHUNK // (K * K))
    parts = [
        unclipped_ratio((part @ fields.flatten(1)).view(-1, K, K)) for part in weights.split(step)
    ]
    unclipped = torch.cat(parts)
    return SNRIntervals(
        _interval(ratio(signal, noise / (K - 1)), level),
        _pair(means, level),
        _interval(unclipped, level),
        _pair(unclipped.mean(1), level),
        level,
        samples,
        seed,
    )


def _interval(values: Tensor, level: float) -> Tensor:
    """Ends (..., 2) of the central interval of samples (samples, ...)."""
    ends = [(1 - level) / 2, (1 + level) / 2]
    # order statistics: interpolation between infinities would be NaN
    found = np.quantile(values.numpy(), ends, axis=0, method="inverted_cdf")
    return torch.from_numpy(np.moveaxis(np.asarray(found), 0, -1).copy())


def _pair(values: Tensor, level: float) -> tuple[float, float]:
    low, high = _interval(values, level).tolist()
    return low, high
