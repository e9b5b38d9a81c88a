"""How training images are augmented and mixed; the defaults are the paper's recipe."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from .dataset import Stats
from .errors import DatasetError

INTERPOLATIONS = ("random", "bilinear", "bicubic")
ERASE_MODES = ("pixel", "const")
PROBABILITIES = ("hflip", "erase_prob", "mix_prob", "switch_prob", "smoothing")


class RandAugment(NamedTuple):
    """The numbers in timm's description of its increasing set, "rand-m9-mstd0.5-inc1".

    Attributes:
        magnitude: m, mean of the magnitude, at most 10.
        std: mstd, its standard deviation.
        layers: n, operations of an image.
        prob: p, probability that a chosen operation is applied.
    """

    magnitude: float = 10.0
    std: float = 0.0
    layers: int = 2
    prob: float = 0.5


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the training split; the defaults are those of the CCT CIFAR-100 recipes.

    Attributes:
        auto_augment: timm's name of a RandAugment policy with the increasing set, "" for none.
        scale: smallest and largest part of the image's area in a random resized crop.
        ratio: smallest and largest width/height ratio of the crop.
        interpolation: "random" (bilinear or bicubic for each use), "bilinear" or "bicubic".
        hflip: probability of a horizontal flip.
        erase_prob: probability that one rectangle of an image is erased.
        erase_mode: "pixel" fills it with N(0, 1), "const" with zeros, both after normalisation.
        mixup: Mixup's alpha; 0 is off.
        cutmix: CutMix's alpha; 0 is off.
        mix_prob: probability that a batch is mixed at all.
        switch_prob: probability of CutMix where both are on.
        smoothing: label smoothing.
        mean: per channel, in units where 255 is 1; None takes the data set's.
        std: likewise.
        crop_padding: of the pipeline "light", which takes no resized crop and no RandAugment: the
            largest displacement in pixels.
        crop_fill: of "light": what shows beyond the border, "zero" or "edge".
    """

    auto_augment: str = "rand-m9-mstd0.5-inc1"
    scale: tuple[float, float] = (0.8, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "random"
    hflip: float = 0.5
    erase_prob: float = 0.25
    erase_mode: str = "pixel"
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    smoothing: float = 0.1
    mean: Stats | None = None
    std: Stats | None = None
    crop_padding: int = 4
    crop_fill: str = "zero"

    def __post_init__(self) -> None:
        """Refuse what no pipeline could do.

        Raises:
            DatasetError: with the field, the value and what is allowed.
        """
        for name in PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise DatasetError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise DatasetError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")
        for name, limit in (("scale", 1.0), ("ratio", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= limit or high == math.inf:
                raise DatasetError(f"{name} must be 0 < low <= high <= {limit}, got {low}, {high}")
        for name, allowed in (
            ("interpolation", INTERPOLATIONS),
            ("erase_mode", ERASE_MODES),
            ("crop_fill", ("zero", "edge")),
        ):
            if getattr(self, name) not in allowed:
                raise DatasetError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.crop_padding < 0:
            raise DatasetError(f"crop_padding must be >= 0, got {self.crop_padding}")
        self.rand_augment()

    def rand_augment(self) -> RandAugment | None:
        """The numbers of `auto_augment`, or None where it is off.

        Raises:
            DatasetError: another policy than RandAugment with the increasing set.
        """
        if not self.auto_augment:
            return None
        head, *parts = self.auto_augment.split("-")
        found = dict.fromkeys(("m", "mstd", "n", "p", "inc"), "")
        for part in parts:
            match = re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", part)
            if match is None or found[match[1]]:
                head = ""
                break
            found[match[1]] = match[2]
        numbers = RandAugment(
            float(found["m"] or 10),
            float(found["mstd"] or 0),
            int(float(found["n"] or 2)),
            float(found["p"] or 0.5),
        )
        good = numbers.magnitude <= 10 and numbers.layers >= 1 and numbers.prob <= 1
        if head != "rand" or found["inc"] != "1" or not good or "." in found["n"] + found["m"]:
            raise DatasetError(
                "auto_augment must be empty or rand-mM[-mstdS][-nN][-pP]-inc1 with M <= 10, "
                f"N >= 1 and P <= 1, got {self.auto_augment!r}"
            )
        return numbers


def default_config(name: str) -> AugmentConfig:
    """The recipe for a data set; letters and digits are not mirrored.

    Args:
        name: "digits", "glyphs100" (with or without tier) or "cifar100".

    Returns:
        The recipe, which `dataclasses.replace` changes.

    Raises:
        DatasetError: no such data set.
    """
    if name.startswith("cifar100"):
        return AugmentConfig()
    if name.startswith(("digits", "glyphs100")):
        return AugmentConfig(hflip=0.0, crop_padding=2, crop_fill="edge")
    raise DatasetError(f"unknown data set {name!r}; allowed: digits, glyphs100, cifar100")
