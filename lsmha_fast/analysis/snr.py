"""Signal and noise of every label, summed over the heads of a block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .clusters import Clusters


class SNR(NamedTuple):
    """Signal-to-noise ratios of one block, K labels, fp64. A ratio without noise is infinite."""

    signal: Tensor  # (K,): heads that recognise label j, S(j)
    noise: Tensor  # (K, K): heads that wrongly answer output j to label i, n(i, j)
    snr: Tensor  # (K,): S(j) / mean over i != j of n(i, j)
    mean_signal: float  # <S>
    mean_noise: float  # <n>, over i != j
    mean_snr: float  # <S> / <n>
    unclipped: Tensor  # (K,): SNR*(i), from the summed fields themselves
    mean_unclipped: float  # mean of SNR* over the labels


def signal_to_noise(matrices: Tensor, clusters: Clusters) -> SNR:
    """Signal-to-noise ratios of one block.

    Clipped: S(j) = number of heads with j in a cluster; n(i, j) = number of heads with B(i, j) = 1,
    i != j, where i and j are not in one cluster of that head; SNR(j) = S(j) / mean_i n(i, j).
    Without clipping: F = sum of the heads' matrices, SNR*(i) = F(i, i) / deviation of F(i, j) over
    j != i. The paper's formula is not known; these are ours (docs/shp.md).

    Args:
        matrices: fields of the block, (H, K, K).
        clusters: what `find_clusters` gave for them.

    Returns:
        The ratios. 0 / 0 counts as 0: a label nobody answers to has no signal.

    Raises:
        ValueError: the shapes do not fit, or there are fewer than two labels.
    """
    fields = check_fields(matrices, clusters)
    return ratios(
        clusters.recognized.sum(0).double(),
        wrong_answers(clusters).sum(0).double(),
        fields.sum(0),
    )


def ratios(signal: Tensor, noise: Tensor, total: Tensor) -> SNR:
    """The ratios from what is summed over heads: recognised labels (K,), wrong answers (K, K) and
    fields (K, K), all fp64."""
    K = len(signal)
    mean_noise = float(noise.sum()) / (K * (K - 1))
    unclipped = unclipped_ratio(total)
    return SNR(
        signal=signal,
        noise=noise,
        snr=ratio(signal, noise.sum(0) / (K - 1)),
        mean_signal=float(signal.mean()),
        mean_noise=mean_noise,
        mean_snr=float(ratio(signal.mean(), torch.tensor(mean_noise, dtype=torch.float64))),
        unclipped=unclipped,
        mean_unclipped=float(unclipped.mean()),
    )


def check_fields(matrices: Tensor, clusters: Clusters) -> Tensor:
    """The matrices as fp64 on the CPU, refused where `clusters` are not theirs."""
    fields = torch.as_tensor(matrices).detach().to("cpu", torch.float64)
    if fields.shape != clusters.above.shape or fields.shape[-1] < 2:
        raise ValueError(
            "expected matrices (H, K >= 2, K) and their clusters, got "
            f"{tuple(fields.shape)} and clusters of {tuple(clusters.above.shape)}"
        )
    if not torch.isfinite(fields).all():
        raise ValueError("the matrices hold elements that are not finite")
    return fields


def wrong_answers(clusters: Clusters) -> Tensor:
    """Elements above threshold off the diagonal and outside the clusters, (H, K, K) bool."""
    same = clusters.assignment[:, :, None] == clusters.assignment[:, None]
    together = same & clusters.recognized[:, None]
    return clusters.above & ~together & ~torch.eye(same.shape[1], dtype=torch.bool)


def unclipped_ratio(total: Tensor) -> Tensor:
    """SNR* (..., K) of summed fields (..., K, K)."""
    K = total.shape[-1]
    wrong = ~torch.eye(K, dtype=torch.bool)
    spread = total[..., wrong].unflatten(-1, (K, K - 1)).std(-1, correction=0)
    return ratio(total.diagonal(dim1=-2, dim2=-1), spread)


def ratio(signal: Tensor, noise: Tensor) -> Tensor:
    """Signal over noise; without signal 0, also where there is no noise."""
    return torch.where(signal == 0, 0.0, signal / noise)
