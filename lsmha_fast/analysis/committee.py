"""Soft committee: the summed outputs of several networks, and what their differences are worth."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ._features import Batches, frozen, model_device, reiterable

COMBINATIONS = ("logit", "probability")
MOST_MEMBERS = 20  # 184756 subsets of one size


class SubsetSize(NamedTuple):
    """Accuracy (0..1) of the committees of one size and kind."""

    size: int
    kind: str  # "all", "distinct" (no two of one group) or "equal" (all of one group)
    subsets: int  # that exist
    measured: int  # of them; fewer where there are too many
    mean: float
    lowest: float
    highest: float


class Comparison(NamedTuple):
    """Paired bootstrap over images of a difference of accuracies."""

    what: str
    difference: float
    low: float  # interval of the difference
    high: float
    p_value: float  # two-sided: how often the resampled difference has the other sign, doubled


class Committee(NamedTuple):
    """What `soft_committee` measured; dictionaries are by combination."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    images: int
    members: tuple[float, ...]  # accuracy of each alone
    sizes: dict[str, tuple[SubsetSize, ...]]
    comparisons: dict[str, tuple[Comparison, ...]]
    level: float
    samples: int
    seed: int


def soft_committee(
    members: Iterable[nn.Module],
    batches: Batches,
    *,
    names: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    max_subsets: int = 200,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Committee:
    """Accuracy of committees that add up their members' logits, or their probabilities.

    Every subset of the members is a committee. Members of one group are seeds of one architecture:
    committees of distinct groups are then compared with equally large ones of a single group, the
    control that tells a gain from different architectures from one from different seeds.

    Args:
        members: modules (B, 3, H, W) -> logits (B, K); may be a generator that makes one after the
            other, since only one is held and on the device at a time.
        batches: (images, labels) of held-out images, the same in every iteration.
        names: of the members; by default "1", "2", ...
        groups: architecture of each member; by default all differ.
        max_subsets: of one size and kind; of more, that many are drawn.
        samples: of the bootstrap over images.
        level: of its intervals.
        seed: of bootstrap and drawn subsets.
        device: where to work; by default where each member is. Members return to where they were.

    Returns:
        Accuracies of all committees, with intervals.

    Raises:
        ValueError: fewer than two or more than `MOST_MEMBERS` members, names or groups of another
            number, members with other classes, logits that are not finite, no batches, labels that
            do not fit.
    """
    if max_subsets < 1 or samples < 1 or not 0 < level < 1:
        raise ValueError(
            "need max_subsets >= 1, samples >= 1 and a level in (0, 1), got "
            f"{max_subsets=} {samples=} {level=}"
        )
    reiterable(batches, "batches")
    outputs, labels = _all_logits(members, batches, device)
    count = len(outputs)
    titles = tuple(map(str, range(1, count + 1))) if names is None else tuple(names)
    group = titles if groups is None else tuple(groups)
    if count > MOST_MEMBERS:
        raise ValueError(f"a committee may have at most {MOST_MEMBERS} members, got {count}")
    if count < 2 or len(titles) != count or len(group) != count:
        raise ValueError(
            "a committee needs at least two members and one name and group for each, got "
            f"{count} members, {len(titles)} names and {len(group)} groups"
        )
    subsets = _subsets(group, max_subsets, np.random.default_rng(seed))
    alone = [_correct(logits, labels) for logits in outputs]
    own = {
        key: np.mean([alone[i] for pick in picks for i in pick], 0)
        for key, (_, picks) in subsets.items()
    }
    sizes, comparisons = {}, {}
    for combination in COMBINATIONS:
        logits = combination == "logit"
        parts = outputs if logits else [x.softmax(1, torch.float64).float() for x in outputs]
        sizes[combination], means = _measure_subsets(parts, labels, subsets)
        pairs = _pairs(means, own, alone, titles)
        comparisons[combination] = _compare(pairs, samples, level, seed)
    accuracies = tuple(float(right.mean()) for right in alone)
    return Committee(
        titles, group, len(labels), accuracies, sizes, comparisons, level, samples, seed
    )


def _all_logits(
    members: Iterable[nn.Module], batches: Batches, device: torch.device | str | None
) -> tuple[list[Tensor], Tensor]:
    """Logits (M, K) in fp32 of each member in turn, on the CPU, and the labels (M,)."""
    outputs: list[Tensor] = []
    labels = torch.empty(0, dtype=torch.int64)
    for member in members:  # not enumerate, which would hold on to the last one
        number = len(outputs) + 1
        logits, found = _logits(member, batches, device)
        del member  # before the next one is made
        K = logits.shape[1]
        if not torch.isfinite(logits).all():
            raise ValueError(f"the logits of member {number} are not finite")
        if outputs and outputs[0].shape[1] != K:
            raise ValueError(f"member {number} has {K} classes, member 1 has {outputs[0].shape[1]}")
        if outputs and not torch.equal(found, labels):
            raise ValueError("the batches gave other labels in another iteration")
        if int(found.min()) < 0 or int(found.max()) >= K:
            raise ValueError(
                f"labels {int(found.min())}..{int(found.max())} do not fit {K} classes"
            )
        labels = found
        outputs.append(logits)
    return outputs, labels


def _logits(
    member: nn.Module, batches: Batches, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    home, there = model_device(member, None), model_device(member, device)
    outputs, labels = [], []
    with frozen(member, there), torch.no_grad():
        for images, y in batches:
            outputs.append(member(images.to(there)).float().cpu())
            labels.append(y.to("cpu", torch.int64))
            if outputs[-1].shape[:1] != labels[-1].shape or outputs[-1].ndim != 2:
                raise ValueError(
                    f"logits of shape {tuple(outputs[-1].shape)} came with labels of shape "
                    f"{tuple(labels[-1].shape)}"
                )
    member.to(home)
    if not outputs or not sum(map(len, labels)):
        raise ValueError("there are no batches to read")
    return torch.cat(outputs), torch.cat(labels)


Pick = tuple[int, ...]


def _subsets(
    groups: Sequence[str], most: int, random: np.random.Generator
) -> dict[tuple[int, str], tuple[int, list[Pick]]]:
    """By (size, kind): how many subsets there are and up to `most` of them.

    "distinct" and "equal" are left out where there are none or where they are the same as "all".
    """
    found: dict[tuple[int, str], tuple[int, list[Pick]]] = {}
    for size in range(1, len(groups) + 1):
        every = list(itertools.combinations(range(len(groups)), size))
        kinds = {"all": every}
        if size > 1:
            variety = [len({groups[i] for i in pick}) for pick in every]
            kinds["distinct"] = [p for p, n in zip(every, variety, strict=True) if n == size]
            kinds["equal"] = [p for p, n in zip(every, variety, strict=True) if n == 1]
        for kind, picks in kinds.items():
            total = len(picks)
            if not picks or (kind != "all" and total == len(every)):
                continue
            if total > most:
                picks = [picks[i] for i in sorted(random.choice(total, most, replace=False))]
            found[size, kind] = total, picks
    return found


def _measure_subsets(
    parts: Sequence[Tensor],
    labels: Tensor,
    subsets: Mapping[tuple[int, str], tuple[int, list[Pick]]],
) -> tuple[tuple[SubsetSize, ...], dict[tuple[int, str], np.ndarray]]:
    """Accuracies, and the share of the subsets that is right for each image, (M,)."""
    sizes, means = [], {}
    for (size, kind), (total, picks) in subsets.items():
        right = np.zeros(len(labels))
        accuracies = []
        for pick in picks:
            total_output = torch.zeros(parts[0].shape, dtype=torch.float64)
            for i in pick:
                total_output += parts[i]
            correct = _correct(total_output, labels)
            right += correct
            accuracies.append(float(correct.mean()))
        means[size, kind] = right / len(picks)
        mean = sum(accuracies) / len(accuracies)
        sizes.append(
            SubsetSize(size, kind, total, len(picks), mean, min(accuracies), max(accuracies))
        )
    return tuple(sizes), means


def _pairs(
    means: Mapping[tuple[int, str], np.ndarray],
    own: Mapping[tuple[int, str], np.ndarray],
    alone: Sequence[np.ndarray],
    names: Sequence[str],
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """What is compared: (text, right per image of the one, of the other)."""
    count = len(alone)
    whole = means[count, "all"]
    best = max(range(count), key=lambda i: alone[i].mean())
    pairs = [
        (f"all {count} - mean member", whole, np.mean(alone, 0)),
        (f"all {count} - best member ({names[best]})", whole, alone[best]),
    ]
    for size in range(2, count + 1):
        if (size, "distinct") in means and (size, "equal") in means:
            text = f"{size} architectures - {size} seeds of one"
            pairs.append((text, means[size, "distinct"], means[size, "equal"]))
            # the two kinds hold members of different skill: compare what joining them adds
            gains = [means[size, kind] - own[size, kind] for kind in ("distinct", "equal")]
            pairs.append((f"{text}, each over its own members", *gains))
    return pairs


def _compare(
    pairs: Sequence[tuple[str, np.ndarray, np.ndarray]], samples: int, level: float, seed: int
) -> tuple[Comparison, ...]:
    """The same images are drawn for both sides: what is resampled is the difference per image."""
    differences = np.stack([first - second for _, first, second in pairs], 1)  # (M, pairs)
    M = len(differences)
    random = np.random.default_rng(seed)
    draws = (np.bincount(random.integers(0, M, M), minlength=M) for _ in range(samples))
    resampled = np.stack([draw @ differences for draw in draws]) / M  # (samples, pairs)
    ends = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(resampled, ends, axis=0, method="inverted_cdf")
    # the measured sample counts as one more: finitely many draws cannot show a p-value of 0
    smaller = np.minimum((resampled <= 0).sum(0), (resampled >= 0).sum(0))
    tails = (smaller + 1) / (samples + 1)
    return tuple(
        Comparison(what, float(d), float(a), float(b), min(1.0, 2 * float(p)))
        for (what, _, _), d, a, b, p in zip(
            pairs, differences.mean(0), low, high, tails, strict=True
        )
    )


def _correct(outputs: Tensor, labels: Tensor) -> np.ndarray:
    """1 where the largest output is the label's, (M,) fp64."""
    return (outputs.argmax(1) == labels).double().numpy()
