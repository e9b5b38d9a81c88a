"""Clusters and noise: which labels a head recognises, read off its SHP matrix."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NORMALIZATIONS = ("matrix", "row")


class Clusters(NamedTuple):
    """The clusters of all heads of one block. H heads, K labels; noise counts matrix elements."""

    above: Tensor  # (H, K, K) bool: elements at or above the threshold
    assignment: Tensor  # (H, K) int64: number of the cluster a label is in, -1 outside
    order: Tensor  # (H, K) int64: the labels permuted so that clusters are diagonal blocks
    number: Tensor  # (H,) int64: clusters, N_c
    mean_size: Tensor  # (H,) fp64: labels per cluster, C_s; 0 where there is no cluster
    internal_noise: Tensor  # (H,) int64: between clusters, n_i
    column_noise: Tensor  # (H,) int64: other labels' images on outputs the head recognises
    rest_noise: Tensor  # (H,) int64: on outputs the head does not recognise
    density: Tensor  # (H,) fp64: external noise / (K^2 - |U|^2); 0 where U is everything
    threshold: float
    normalize: str

    @property
    def external_noise(self) -> Tensor:
        """Elements above threshold outside the square of recognised labels, n_e (H,)."""
        return self.column_noise + self.rest_noise

    @property
    def recognized(self) -> Tensor:
        """Whether head h recognises label j, that is, j is in a cluster of h; (H, K) bool."""
        return self.assignment >= 0

    def labels(self, head: int) -> list[list[int]]:
        """The clusters of one head in block-diagonal order, each a list of labels."""
        clusters: dict[int, list[int]] = {}
        for label in self.order[head].tolist():
            number = int(self.assignment[head, label])
            if number >= 0:
                clusters.setdefault(number, []).append(label)
        return list(clusters.values())


def find_clusters(
    matrices: Tensor, *, threshold: float = 0.5, normalize: str = "matrix"
) -> Clusters:
    """Find the label clusters of every head of a block.

    A matrix is divided by its largest element and cut at `threshold` to a Boolean B. A cluster is
    a set of labels with B(i, j) = 1 for all i, j in it; a unit cluster is one label with
    B(i, i) = 1. Disjoint clusters come from a greedy cover by maximal cliques: each clique grows
    by the label with most partners left, among equals by the one with the largest own field, among
    equals by the first one. So only exact ties of fields depend on how the labels are numbered.

    Threshold, normalisation and this rule are ours: the paper's are not known (docs/shp.md).

    Args:
        matrices: fields M[h, i, j] of true label i on output j, (H, K, K), as `SHP.matrix` gives.
        threshold: of the divided fields, in (0, 1].
        normalize: "matrix" divides by the largest element of the matrix, "row" each row by its
            largest. A matrix or row without a positive element has nothing above threshold.

    Returns:
        The clusters, on the CPU.

    Raises:
        ValueError: not square, not finite, a threshold outside (0, 1], unknown normalisation.
    """
    fields = _checked(matrices, threshold, normalize)
    dims = (1, 2) if normalize == "matrix" else 2
    largest = fields.amax(dims, keepdim=True)
    # a positive field is also asked for: fields so small that the product is 0 are not signal
    above = (fields >= threshold * largest) & (fields > 0)
    own = fields.diagonal(dim1=1, dim2=2).tolist()
    covers = [_clique_cover(_bitsets(m), o) for m, o in zip(above & above.mT, own, strict=True)]
    assignment = torch.tensor(covers)
    return Clusters(**_statistics(above, assignment), threshold=threshold, normalize=normalize)


def _checked(matrices: Tensor, threshold: float, normalize: str) -> Tensor:
    fields = torch.as_tensor(matrices).detach().to("cpu", torch.float64)
    if fields.ndim != 3 or fields.shape[1] != fields.shape[2] or fields.numel() == 0:
        raise ValueError(f"expected matrices (H, K, K), got {tuple(fields.shape)}")
    if not torch.isfinite(fields).all():
        raise ValueError("the matrices hold elements that are not finite")
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold must be in (0, 1], got {threshold}")
    if normalize not in NORMALIZATIONS:
        raise ValueError(
            f"unknown normalisation {normalize!r}; choose from {', '.join(NORMALIZATIONS)}"
        )
    return fields


def _clique_cover(partners: list[int], strength: list[float]) -> list[int]:
    """Disjoint cliques of one graph on its labels with a loop: the clique's number, -1 outside.

    `partners[i]` has bit j set where labels i and j are partners. Sets as integers: counting
    partners is one `and` and one popcount, faster than tensors and indifferent to threads.
    """
    assignment = [-1] * len(partners)
    free = [i for i, own in enumerate(partners) if own >> i & 1]
    cluster = 0
    while free:
        candidates = free
        while candidates:
            left = sum(1 << i for i in candidates)
            # of equals `max` takes the first
            pick = max(
                candidates,
                key=lambda i: ((partners[i] & left).bit_count(), strength[i]),
            )
            if candidates is free and partners[pick] & left == 1 << pick:
                # nobody left has a partner: the same picks, in one sort instead of one search each
                for i in sorted(free, key=lambda i: -strength[i]):
                    assignment[i] = cluster
                    cluster += 1
                return assignment
            assignment[pick] = cluster
            candidates = [i for i in candidates if partners[pick] >> i & 1 and i != pick]
        free = [i for i in free if assignment[i] < 0]
        cluster += 1
    return assignment


def _bitsets(mutual: Tensor) -> list[int]:
    """Rows of a Boolean (K, K) as integers, column j as bit j."""
    packed = np.packbits(mutual.numpy(), axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def _statistics(above: Tensor, assignment: Tensor) -> dict[str, Tensor]:
    """The tensor fields of `Clusters`."""
    H, K = assignment.shape
    recognized = assignment >= 0
    sizes = torch.zeros(H, K + 1, dtype=torch.int64)
    sizes.scatter_add_(1, assignment + 1, torch.ones_like(assignment))
    sizes = sizes[:, 1:]  # labels of every cluster
    number = (sizes > 0).sum(1)
    labels = recognized.sum(1)
    in_block = (assignment[:, :, None] == assignment[:, None]) & recognized[:, None]
    square = recognized[:, :, None] & recognized[:, None]
    column = above & recognized[:, None] & ~recognized[:, :, None]
    rest = above & ~recognized[:, None]
    external = (column | rest).sum((1, 2))
    size_of_label = torch.where(recognized, sizes.gather(1, assignment.clamp(min=0)), 0)
    # big clusters first, then in the order they were found, labels outside last
    key = (K - size_of_label) * (K + 1) + torch.where(recognized, assignment, K)
    return {
        "above": above,
        "assignment": assignment,
        "order": key.argsort(dim=1, stable=True),
        "number": number,
        "mean_size": labels.double() / number.clamp(min=1),
        "internal_noise": (above & square & ~in_block).sum((1, 2)),
        "column_noise": column.sum((1, 2)),
        "rest_noise": rest.sum((1, 2)),
        "density": external.double() / (K * K - labels**2).clamp(min=1),
    }
