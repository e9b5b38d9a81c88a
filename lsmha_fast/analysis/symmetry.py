"""Symmetry breaking: how the labels are shared out among the heads of a block, and over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._assignment import best_assignment
from .clusters import Clusters


class Symmetry(NamedTuple):
    """How one block shares its labels out. H heads, K labels, fp64."""

    label_by_head: Tensor  # (K, H): own field of the label / largest field, 0 where not recognised
    head_entropy: Tensor  # (H,): of the head's positive own fields, 0 one label, 1 all alike
    label_entropy: Tensor  # (K,): of the label's positive own fields, 0 one head, 1 all alike
    overlap: Tensor  # (H, H): labels two heads share / labels either recognises
    mean_overlap: float  # over pairs of heads that both recognise something
    chance_overlap: float  # the same for label sets of those sizes drawn at random
    heads_per_label: Tensor  # (K,) int64
    silent_heads: int  # heads that recognise nothing
    lost_labels: int  # labels nobody recognises


def symmetry_breaking(
    matrices: Tensor, clusters: Clusters, *, draws: int = 20, seed: int = 0
) -> Symmetry:
    """Which head serves which label, and how far from all heads serving all labels that is.

    Entropies are those of the positive parts of M(h, j, j), as shares of a head over labels or of
    a label over heads, divided by the logarithm of their number. A head or label without a positive
    field, or a single one to choose from, has entropy 0. Heads that shared their labels out by
    design overlap less than `chance_overlap`, heads that all do the same overlap more.

    Args:
        matrices, clusters: as for `signal_to_noise`.
        draws: random label sets behind `chance_overlap`.
        seed: of those.

    Returns:
        Shares and entropies of heads and labels, and their overlap.

    Raises:
        ValueError: the shapes do not fit, or fewer than one draw.
    """
    fields = torch.as_tensor(matrices).detach().to("cpu", torch.float64)
    if fields.shape != clusters.above.shape or draws < 1:
        raise ValueError(
            f"expected matrices (H, K, K), their clusters and draws >= 1, got {tuple(fields.shape)}"
            f", clusters of {tuple(clusters.above.shape)} and {draws=}"
        )
    own = fields.diagonal(dim1=1, dim2=2)  # (H, K)
    largest = fields.amax((1, 2))[:, None]
    recognized = clusters.recognized
    shown = torch.where(recognized, own / torch.where(largest > 0, largest, 1.0), 0.0)
    overlap, mean = _overlaps(recognized)
    generator = torch.Generator().manual_seed(seed)
    chance = [_overlaps(_scattered(recognized, generator))[1] for _ in range(draws)]
    return Symmetry(
        label_by_head=shown.T.contiguous(),
        head_entropy=_entropy(own.clamp(min=0)),
        label_entropy=_entropy(own.clamp(min=0).T),
        overlap=overlap,
        mean_overlap=mean,
        chance_overlap=sum(chance) / draws,
        heads_per_label=recognized.sum(0),
        silent_heads=int((~recognized.any(1)).sum()),
        lost_labels=int((~recognized.any(0)).sum()),
    )


def symmetry_lines(symmetry: Symmetry) -> list[str]:
    """One line for people."""
    s = symmetry
    return [
        f"  sharing out: entropy of a head over labels {float(s.head_entropy.mean()):.2f}, of a "
        f"label over heads {float(s.label_entropy.mean()):.2f} (0 one, 1 all alike); two heads "
        f"share {s.mean_overlap:.0%} of their labels (chance {s.chance_overlap:.0%}); "
        f"{s.silent_heads} heads recognise nothing, {s.lost_labels} labels have no head"
    ]


def symmetry_record(symmetry: Symmetry) -> dict[str, object]:
    """Plain numbers for JSON."""
    return {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in symmetry._asdict().items()
        if name != "overlap"
    }


class Stability(NamedTuple):
    """How alike the heads of one block are in two networks, matched one to one."""

    match: Tensor  # (min(H, H'), 2) int64: head of the first, its partner in the second
    similarity: Tensor  # (min(H, H'),) fp64: cosine of the partners' own fields over labels
    mean_similarity: float
    chance: float  # mean similarity of the best match with the second's labels permuted


def head_stability(first: Tensor, second: Tensor, *, draws: int = 10, seed: int = 0) -> Stability:
    """Match the heads of one block over two seeds, best in sum.

    Heads have no order of their own, so the heads of two networks are compared after the one-to-one
    match with the largest summed similarity: the cosine of the positive own fields of the labels.
    A good match is found among many heads also by luck; `chance` is what permuted labels give.

    Args:
        first, second: matrices (H, K, K) and (H', K, K) of the two networks.
        draws: permutations behind `chance`.
        seed: of those.

    Returns:
        The match and its similarity, beside `chance`.

    Raises:
        ValueError: shapes that do not fit, fields that are not finite, or fewer than one draw.
    """
    profiles = [_profiles(m) for m in (first, second)]
    if profiles[0].shape[1] != profiles[1].shape[1] or draws < 1:
        raise ValueError(
            "expected matrices of the same labels and draws >= 1, got "
            f"{profiles[0].shape[1]} and {profiles[1].shape[1]} labels and {draws=}"
        )
    match, similarity = _matched(*profiles)
    generator = torch.Generator().manual_seed(seed)
    lucky = []
    for _ in range(draws):
        order = torch.randperm(profiles[1].shape[1], generator=generator)
        lucky.append(float(_matched(profiles[0], profiles[1][:, order])[1].mean()))
    return Stability(match, similarity, float(similarity.mean()), sum(lucky) / draws)


def stability_over_seeds(
    networks: Sequence[Tensor], *, draws: int = 10, seed: int = 0
) -> list[tuple[int, int, Stability]]:
    """`head_stability` of every pair of networks.

    Args:
        networks: matrices (H, K, K) of the same block of each.
        draws, seed: see `head_stability`.

    Returns:
        Per pair (number of the first, number of the second, result).
    """
    return [
        (a, b, head_stability(networks[a], networks[b], draws=draws, seed=seed))
        for b in range(len(networks))
        for a in range(b)
    ]


def _entropy(values: Tensor) -> Tensor:
    """Entropy of the rows as shares, divided by its largest value; 0 for an empty row."""
    if values.shape[1] < 2:
        return torch.zeros(len(values), dtype=torch.float64)
    shares = values / values.sum(1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(1) / math.log(values.shape[1])


def _overlaps(recognized: Tensor) -> tuple[Tensor, float]:
    """Jaccard index of all pairs (H, H), and its mean over pairs of heads with labels."""
    sets = recognized.double()
    both = sets @ sets.T
    sizes = sets.sum(1)
    either = sizes[:, None] + sizes - both
    overlap = both / either.clamp(min=1)
    filled = sizes > 0
    pairs = (filled[:, None] & filled).triu(1)
    return overlap, float(overlap[pairs].mean()) if pairs.any() else 0.0


def _scattered(recognized: Tensor, generator: torch.Generator) -> Tensor:
    """Every head's labels replaced by as many others, at random."""
    order = torch.rand(recognized.shape, generator=generator).argsort(1)
    return recognized.gather(1, order)


def _profiles(matrices: Tensor) -> Tensor:
    """Positive own fields of unit length, (H, K); a head without any has zeros."""
    fields = torch.as_tensor(matrices).detach().to("cpu", torch.float64)
    if fields.ndim != 3 or fields.shape[1] != fields.shape[2] or fields.numel() == 0:
        raise ValueError(f"expected matrices (H, K, K), got {tuple(fields.shape)}")
    if not torch.isfinite(fields).all():
        raise ValueError("the matrices hold elements that are not finite")
    own = fields.diagonal(dim1=1, dim2=2).clamp(min=0)
    return torch.nn.functional.normalize(own, dim=1, eps=1e-300)


def _matched(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    likeness = first @ second.T
    rows, columns = best_assignment(likeness.numpy())
    match = torch.from_numpy(np.stack([rows, columns], 1))
    return match, likeness[match[:, 0], match[:, 1]]
