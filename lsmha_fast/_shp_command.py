"""`lsmha shp`: from a run folder to probes, the SHP of every head, and pictures of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from . import analysis
from .data import Batches, ImageDataset, normalize
from .train.run import Run, load_run, load_split, pick_device


@dataclass(frozen=True)
class ShpOptions:
    """Choices of `lsmha shp`; those of the method are explained in docs/shp.md."""

    weights: str = "best"
    probe_epochs: int = 40
    probe_lr: float = 1e-2
    layer_norm: bool = False
    pooling: str = "head"
    bias: bool = False
    threshold: float = 0.5
    batch_size: int = 256
    data_root: str | None = None
    device: str = "auto"


class NormalizedBatches:
    """Batches of (float images, labels), as often as one likes, in one fixed order."""

    def __init__(self, dataset: ImageDataset, stats: ImageDataset, options: ShpOptions, shuffle):
        device = pick_device(options.device)
        self.stats = stats
        self.batches = Batches(dataset, options.batch_size, shuffle=shuffle, seed=0, device=device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            yield normalize(images, self.stats.mean, self.stats.std), labels

    def __len__(self) -> int:
        return len(self.batches)
