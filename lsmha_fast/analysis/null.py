"""Null models: what the numbers would be if heads or probes knew nothing about the labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._features import Batches, frozen, head_batches, model_device, reiterable
from .clusters import find_clusters
from .probes import BlockProbe, Probes
from .shp import SHP, HeadSums
from .snr import signal_to_noise
from .summary import block_numbers

# kinds, and what they are called
TITLES = {"labels": "permuted labels", "probes": "random probes"}
Numbers = dict[str, float | int | None]


class NullModel(NamedTuple):
    """SHP without signal, several draws of each kind."""

    labels: tuple[SHP, ...]  # trained probes, the images' labels permuted
    probes: tuple[SHP, ...]  # true labels, probes with random weights
    seed: int

    def numbers(
        self, block: int, *, threshold: float = 0.5, normalize: str = "matrix"
    ) -> dict[str, list[Numbers]]:
        """`block_numbers` of one block: for each kind one record per draw."""
        result: dict[str, list[Numbers]] = {}
        for kind in TITLES:
            result[kind] = []
            for shp in getattr(self, kind):
                matrices = shp.matrix(block)
                found = find_clusters(matrices, threshold=threshold, normalize=normalize)
                result[kind].append(block_numbers(found, signal_to_noise(matrices, found)))
        return result


def measure_null(
    model: nn.Module,
    probes: Probes,
    batches: Batches,
    *,
    draws: int = 3,
    seed: int = 0,
    pooling: str = "head",
    bias: bool = False,
    class_names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> NullModel:
    """Measure both null models, all draws, in one pass of the frozen model.

    "labels": the labels of all images are permuted, so that every class holds the same mixture of
    images and what is left is the mean field of the head and its sampling noise. "probes": pooling
    and linear layer are drawn from a normal distribution with the deviation of the trained ones,
    per block, so that what is left is the geometry of the features.

    Args:
        model, probes, batches, pooling, bias, class_names, device, backend: as for
            `single_head_performance`; `batches` gives the same labels in every iteration.
        draws: of each kind.
        seed: of permutations and weights.

    Returns:
        Both kinds, all draws of each.

    Raises:
        ValueError: fewer than one draw, batches that cannot be iterated again, and what
            `single_head_performance` refuses.
    """
    if draws < 1:
        raise ValueError(f"need at least one draw, got {draws}")
    reiterable(batches, "batches")
    device = model_device(model, device)
    generator = torch.Generator().manual_seed(seed)
    labels = [labels.cpu() for _, labels in batches]
    if not labels:
        raise ValueError("there are no batches to read")
    permuted = [_permuted(labels, generator) for _ in range(draws)]
    randoms = [random_probes(probes, generator) for _ in range(draws)]

    def sums(which: Probes) -> HeadSums:
        return HeadSums(which, pooling, bias, class_names, device, backend)

    by_label, by_probe = [sums(probes) for _ in range(draws)], [sums(p) for p in randoms]
    with frozen(model, device), torch.no_grad():
        for number, batch in enumerate(head_batches(model, batches, device)):
            for total, other in zip(by_label, permuted, strict=True):
                total.add(batch, other[number].to(batch.labels))
            for total in by_probe:
                total.add(batch)
    return NullModel(
        tuple(total.take() for total in by_label), tuple(total.take() for total in by_probe), seed
    )


def random_probes(probes: Probes, generator: torch.Generator) -> Probes:
    """Probes whose weights are normal of the trained ones' mean square; no accuracy."""

    def like(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator) * t.square().mean().sqrt()

    blocks = tuple(BlockProbe(*(like(t) for t in probe)) for probe in probes.blocks)
    return replace(probes, blocks=blocks, accuracy=None, model_accuracy=None)


def null_lines(numbers: dict[str, list[Numbers]]) -> Iterator[str]:
    """One line per kind: mean over the draws of what `summarize` prints for the block."""
    for kind, draws in numbers.items():
        n = null_means(draws)
        yield (
            f"  null, {TITLES[kind]}: SNR {n['snr']:.2f} (without threshold "
            f"{n['snr_unclipped']:.2f}), {n['clusters']:.2f} clusters of {n['cluster_size']:.2f} "
            f"labels, noise {n['internal_noise']:.2f} internal, {n['external_noise']:.2f} external"
        )


def null_means(draws: Sequence[Numbers]) -> dict[str, float]:
    """Means over draws; a ratio without noise makes its mean infinite."""
    means = {}
    for name in draws[0]:
        values = [float("inf") if (v := d[name]) is None else float(v) for d in draws]
        means[name] = sum(values) / len(values)
    return means


def _permuted(labels: list[Tensor], generator: torch.Generator) -> tuple[Tensor, ...]:
    """The labels of all images in another order, cut into the same batches."""
    flat = torch.cat(labels)
    order = torch.randperm(len(flat), generator=generator)
    return flat[order].split([len(part) for part in labels])
