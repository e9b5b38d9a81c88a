"""Which heads to drop: those whose labels other heads of the block recognise, and controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..models import CCT
from ..nn import EncoderBlock
from .clusters import Clusters

KeptHeads = tuple[tuple[int, ...], ...]  # per block, ascending


class HeadRanking(NamedTuple):
    """Heads in the order in which they go; every beginning of that order is a pruning.

    The last head of a block never goes.
    """

    removal: tuple[tuple[int, int], ...]  # (block, head), both from 0; the first goes first
    rounds: tuple[Tensor, ...]  # per block (H,): round of the cover that takes the head, 0: none
    recognized: tuple[Tensor, ...]  # per block (H, K) bool

    def redundant(self, keep_per_label: int = 1) -> int:
        """How many heads go before any label has fewer than `keep_per_label` heads in a block
        where so many recognise it."""
        rounds = [int(self.rounds[block][head]) for block, head in self.removal]
        return sum(not 1 <= r <= keep_per_label for r in rounds)

    def kept(self, number: int) -> KeptHeads:
        """Heads that are left when `number` heads have gone, per block.

        Raises:
            ValueError: fewer than 0, or more than can go.
        """
        if not 0 <= number <= len(self.removal):
            raise ValueError(
                f"0 to {len(self.removal)} heads can be removed (each block keeps one), "
                f"got {number}"
            )
        gone = set(self.removal[:number])
        return tuple(
            tuple(h for h in range(len(rounds)) if (m, h) not in gone)
            for m, rounds in enumerate(self.rounds)
        )

    def uncovered(self, kept: KeptHeads, keep_per_label: int = 1) -> int:
        """Labels, added up over the blocks, that are recognised by fewer than `keep_per_label` of
        the heads kept, and by more of all heads."""
        total = 0
        for recognized, heads in zip(self.recognized, kept, strict=True):
            before, after = recognized.sum(0), recognized[list(heads)].sum(0)
            total += int((after < before.clamp(max=keep_per_label)).sum())
        return total


def rank_heads(matrices: Sequence[Tensor], clusters: Sequence[Clusters]) -> HeadRanking:
    """Order all heads of a model by how little is lost without them (ours, docs/pruning.md).

    Within a block a greedy set cover takes heads one by one. In round r a label is open while
    fewer than r of the heads taken recognise it, and some head left does. The head with most open
    labels is taken; of equals the one whose own fields M(j, j) of these labels, as shares of its
    largest field, add up to most; of equals the first. When no label is open, the next round
    begins. So after round r every label has r heads, or all that recognise it.

    Heads go in this order: those that recognise nothing, the weakest largest field (as a share of
    the block's) first; then the last round before the earlier ones, within a round those that were
    taken for fewer labels first, of equals the later taken, of equals the earlier block. The first
    head taken in a block never goes.

    Args:
        matrices: fields (H, K, K) of every block.
        clusters: what `find_clusters` gave for them.

    Returns:
        The order, and which head recognises which label.

    Raises:
        ValueError: no block, or clusters of other matrices.
    """
    if not matrices or len(matrices) != len(clusters):
        raise ValueError(f"{len(matrices)} blocks of matrices, {len(clusters)} of clusters")
    keyed, rounds = [], []
    for m, (fields, found) in enumerate(zip(matrices, clusters, strict=True)):
        if fields.shape != found.above.shape:
            raise ValueError(
                f"block {m + 1}: matrices {tuple(fields.shape)}, clusters of "
                f"{tuple(found.above.shape)}"
            )
        largest = fields.double().amax((1, 2)).cpu()
        own = fields.diagonal(dim1=1, dim2=2).double().cpu() / largest.clamp(min=1e-300)[:, None]
        taken = _cover(found.recognized, own)
        rounds.append(torch.zeros(len(fields), dtype=torch.int64))
        for place, (head, number, labels) in enumerate(taken):
            rounds[m][head] = number
            if place:
                keyed.append(((1, -number, labels, -place, m), (m, head)))
        strength = (largest / largest.max().clamp(min=1e-300)).tolist()
        silent = sorted(
            (h for h in range(len(fields)) if not rounds[m][h]), key=lambda h: strength[h]
        )
        if not taken:
            silent.pop()  # a block keeps one head even where none recognises anything
        keyed += [((0, 0, strength[h], h, m), (m, h)) for h in silent]
    removal = tuple(head for _, head in sorted(keyed))
    return HeadRanking(removal, tuple(rounds), tuple(c.recognized for c in clusters))


def _cover(recognized: Tensor, own: Tensor) -> list[tuple[int, int, int]]:
    """(head, round, labels it was taken for) of all heads that recognise anything, as taken."""
    left = [h for h in range(len(recognized)) if recognized[h].any()]
    total, count = recognized.sum(0), torch.zeros(recognized.shape[1], dtype=torch.int64)
    taken, number = [], 1
    while left:
        wanted = recognized & (count < total.clamp(max=number))  # (H, K)
        labels, strength = wanted.sum(1).tolist(), (own * wanted).sum(1).tolist()
        head = max(left, key=lambda h: (labels[h], strength[h], -h))
        if not labels[head]:
            number += 1
            continue
        taken.append((head, number, labels[head]))
        left.remove(head)
        count += recognized[head]
    return taken


def head_magnitudes(model: CCT) -> tuple[Tensor, ...]:
    """How large the weights are that belong to each head alone.

    Args:
        model: with any number of transformer blocks.

    Returns:
        Per transformer block (H,): the norm of a head's rows of q, k and v and its columns of the
        output projection, all together.
    """
    norms = []
    for block in model.blocks:
        if isinstance(block, EncoderBlock):
            attn = block.self_attn
            qkv = attn.in_proj_weight.detach().unflatten(0, (3, attn.num_heads, attn.head_dim))
            out = attn.out_proj.weight.detach().unflatten(1, (attn.num_heads, attn.head_dim))
            square = qkv.double().square().sum((0, 2, 3)) + out.double().square().sum((0, 2))
            norms.append(square.sqrt().cpu())
    return tuple(norms)


def largest_heads(scores: Sequence[Tensor], counts: Sequence[int]) -> KeptHeads:
    """Per block m the `counts[m]` heads of largest `scores[m]`; of equals the first."""
    return tuple(
        tuple(sorted(s.argsort(descending=True, stable=True)[:count].tolist()))
        for s, count in zip(scores, counts, strict=True)
    )


def random_heads(sizes: Sequence[int], counts: Sequence[int], seed: int) -> KeptHeads:
    """Per block `counts[m]` of `sizes[m]` heads; with one seed fewer heads are a part of more."""
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randperm(size, generator=generator).double() for size in sizes]
    return largest_heads(scores, counts)
