"""What a data set is: two tensors, names, and the statistics of its training split."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import DatasetError

Stats = tuple[float, float, float]


@dataclass(frozen=True)
class ImageDataset:
    """One split of a labelled image set, checked when it is made.

    Attributes:
        name: how logs and pictures call it; says "(generated)" where the images are.
        images: (M, 3, H, W) uint8, RGB.
        labels: (M,) int64 in [0, K).
        class_names: K names, index = label.
        mean: per channel, of the training split, in units where 255 is 1.
        std: likewise, over all pixels of the training split.
        generated: the images were drawn by a program, not taken from the world.
        coarse_labels: (M,) int64 group of each sample, or None.
        coarse_names: names of the groups; empty where there are none.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    mean: Stats
    std: Stats
    generated: bool = False
    coarse_labels: Tensor | None = None
    coarse_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.check()

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def num_classes(self) -> int:
        """Labels K."""
        return len(self.class_names)

    def part(self, which: Tensor | slice) -> ImageDataset:
        """Some of the samples, by numbers, mask or slice; mean and std stay those of the whole."""
        coarse = self.coarse_labels
        return replace(
            self,
            images=self.images[which],
            labels=self.labels[which],
            coarse_labels=None if coarse is None else coarse[which],
        )

    def check(self) -> None:
        """Raise `DatasetError` unless shapes, dtypes, label ranges and statistics fit together."""
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise DatasetError(
                f"{self.name}: images must be uint8 (M, 3, H, W), "
                f"got {self.images.dtype} {tuple(self.images.shape)}"
            )
        self._check_labels("labels", self.labels, self.class_names)
        if self.coarse_labels is not None:
            self._check_labels("coarse_labels", self.coarse_labels, self.coarse_names)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise DatasetError(
                f"{self.name}: mean and std must be three numbers each, std above zero, "
                f"got {self.mean} and {self.std}"
            )

    def _check_labels(self, field: str, labels: Tensor, names: tuple[str, ...]) -> None:
        if labels.dtype != torch.int64 or labels.shape != self.images.shape[:1]:
            raise DatasetError(
                f"{self.name}: {field} must be int64 ({len(self)},), "
                f"got {labels.dtype} {tuple(labels.shape)}"
            )
        if len(set(names)) != len(names):
            raise DatasetError(f"{self.name}: names of {field} are not unique")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
            raise DatasetError(
                f"{self.name}: {field} must lie in 0..{len(names) - 1}, "
                f"got {int(labels.min())}..{int(labels.max())}"
            )


def channel_stats(images: Tensor) -> tuple[Stats, Stats]:
    """Mean and standard deviation per channel of (M, 3, H, W) uint8, in units where 255 is 1."""
    x = images.double() / 255
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)
    as_stats = [tuple(round(v, 4) for v in t.tolist()) for t in (mean, std)]
    return as_stats[0], as_stats[1]  # type: ignore[return-value]
