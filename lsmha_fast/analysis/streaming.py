"""Clusters and ratios of a block with a thousand labels, some heads at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .clusters import find_clusters
from .shp import SHP
from .snr import SNR, ratios, wrong_answers

# what an element of a (H, K, K) matrix takes at most while its clusters are found: the fields in
# fp32 and three times in fp64, and Boolean tensors
BYTES_PER_ELEMENT = 40


class BlockStatistics(NamedTuple):
    """What `find_clusters` and `signal_to_noise` say of a block, without anything (H, K, K)."""

    assignment: Tensor  # (H, K) int64: number of the cluster a label is in, -1 outside
    number: Tensor  # (H,) int64
    mean_size: Tensor  # (H,) fp64
    internal_noise: Tensor  # (H,) int64
    column_noise: Tensor  # (H,) int64
    rest_noise: Tensor  # (H,) int64
    density: Tensor  # (H,) fp64
    snr: SNR


def stream_block(
    shp: SHP,
    block: int,
    *,
    threshold: float = 0.5,
    normalize: str = "matrix",
    chunk_bytes: int = 256 << 20,
) -> BlockStatistics:
    """Find the clusters of a block and its ratios with bounded memory.

    The matrices of as many heads as fit into `chunk_bytes` (at least one) are multiplied out from
    their factors, read and dropped. Clusters are those of `find_clusters`; sums over heads are
    fp64, so the ratios differ from `signal_to_noise` by rounding at most. The bound is one on what
    is allocated: glibc may keep freed blocks of some MiB that it does not reuse, unless the
    environment has MALLOC_MMAP_THRESHOLD_=1048576 when Python starts.

    Args:
        shp: what was measured.
        block: number of the block, from 0.
        threshold, normalize: as for `find_clusters`.
        chunk_bytes: memory beside the factors and four (K, K) matrices.

    Returns:
        Clusters and ratios of the block.

    Raises:
        ValueError: as `find_clusters`, or fewer than two labels.
    """
    H, K = shp.sums[block].shape[1], len(shp.class_names)
    if K < 2:
        raise ValueError(f"ratios need at least two labels, got {K}")
    step = max(1, chunk_bytes // (BYTES_PER_ELEMENT * K * K))
    signal = torch.zeros(K, dtype=torch.float64)
    noise, total = torch.zeros(2, K, K, dtype=torch.float64)
    per_head: dict[str, list[Tensor]] = {
        name: [] for name in BlockStatistics._fields if name != "snr"
    }
    for start in range(0, H, step):
        fields = shp.matrix(block, slice(start, start + step))
        found = find_clusters(fields, threshold=threshold, normalize=normalize)
        signal += found.recognized.sum(0)
        noise += wrong_answers(found).sum(0)
        total += fields.sum(0, dtype=torch.float64)
        for name, parts in per_head.items():
            parts.append(getattr(found, name))
    joined = {name: torch.cat(parts) for name, parts in per_head.items()}
    return BlockStatistics(**joined, snr=ratios(signal, noise, total))
