"""What a model needs to know of its data set after training, without the images."""

from __future__ import annotations

from typing import NamedTuple

from . import cifar100_names, glyphs
from .dataset import Stats
from .digits import load_digits


class DatasetFacts(NamedTuple):
    """Names of the labels, and mean and standard deviation per channel, where 255 is 1."""

    class_names: tuple[str, ...]
    mean: Stats
    std: Stats


def dataset_facts(name: str, tier: str = "easy") -> DatasetFacts:
    """Facts of a data set by name; no file of cifar100 is needed.

    Args:
        name: "digits", "glyphs100" or "cifar100".
        tier: of glyphs100.
    """
    if name == "cifar100":
        official = cifar100_names
        return DatasetFacts(official.FINE_NAMES, official.MEAN, official.STD)
    if name == "glyphs100":
        made = glyphs.TIERS[tier]
        return DatasetFacts(glyphs.CLASS_NAMES, made.mean, made.std)
    digits = load_digits("test")
    return DatasetFacts(digits.class_names, digits.mean, digits.std)
