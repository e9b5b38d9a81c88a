"""Data sets by name: load, describe, verify."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cifar100 import load_cifar100, verify_cifar100
from .dataset import ImageDataset
from .digits import load_digits, read_digits
from .errors import DatasetError
from .glyphs import load_glyphs100, verify_glyphs100

_LOADERS: dict[str, Callable[..., ImageDataset]] = {
    "digits": load_digits,
    "glyphs100": load_glyphs100,
    "cifar100": load_cifar100,
}
DATASETS = tuple(_LOADERS)


def load_dataset(
    name: str, split: str, root: str | Path | None = None, **options: Any
) -> ImageDataset:
    """Load one split of a data set.

    Args:
        name: "digits" (real, from scikit-learn), "glyphs100" (generated) or "cifar100".
        split: "train" or "test".
        root: folder with the files; needed by cifar100, refused by the others, which have none.
        **options: digits: `size`; glyphs100: `tier`, `size`, `seed`; cifar100: `allow_unverified`.

    Returns:
        The split.

    Raises:
        DatasetError: whatever is wrong, in one line.
    """
    loader = _LOADERS[_known(name)]
    allowed = [key for key in inspect.signature(loader).parameters if key not in ("split", "root")]
    for key in options:
        if key not in allowed:
            raise DatasetError(f"{name} has no option {key!r}; allowed: {', '.join(allowed)}")
    if name == "cifar100":
        return loader(split, _as_path(root), **options)
    _refuse_root(name, root)
    return loader(split, **options)


def describe(
    name: str, split: str = "train", root: str | Path | None = None, **options: Any
) -> list[str]:
    """Counts, sizes and names of a split, as lines for people; arguments as of `load_dataset`.

    Args:
        name, split, root, **options: see `load_dataset`.

    Returns:
        Lines without line ends.
    """
    dataset = load_dataset(name, split, root, **options)
    per_class = dataset.labels.bincount(minlength=dataset.num_classes)
    height, width = dataset.images.shape[-2:]
    lines = [
        f"{dataset.name}, {split}: {len(dataset)} images {height}x{width}, "
        f"{dataset.num_classes} classes, {per_class.min()} to {per_class.max()} per class",
        f"mean {dataset.mean}, std {dataset.std}",
        f"classes: {', '.join(dataset.class_names)}",
    ]
    if dataset.coarse_names:
        lines.append(f"groups: {', '.join(dataset.coarse_names)}")
    return lines


def verify(
    name: str,
    root: str | Path | None = None,
    allow_unverified: bool = False,
    **options: Any,
) -> list[str]:
    """Check the files behind a data set and say what was checked.

    Args:
        name: as in `load_dataset`.
        root: folder with the files of cifar100.
        allow_unverified: report files that differ from the published ones instead of failing.
        **options: glyphs100: `tier`.

    Returns:
        What was checked, as lines for people.

    Raises:
        DatasetError: the first thing that is wrong.
    """
    if _known(name) == "cifar100":
        return verify_cifar100(_as_path(root), allow_unverified)
    _refuse_root(name, root)
    if name == "glyphs100":
        return verify_glyphs100(**options)
    pixels, _ = read_digits()
    return [f"digits: {len(pixels)} images from scikit-learn, sha256 matches"]


def _known(name: str) -> str:
    if name not in _LOADERS:
        raise DatasetError(f"unknown data set {name!r}; allowed: {', '.join(DATASETS)}")
    return name


def _as_path(root: str | Path | None) -> Path | None:
    return None if root is None else Path(root).expanduser()


def _refuse_root(name: str, root: str | Path | None) -> None:
    if root is not None:
        raise DatasetError(f"{name} has no files of its own, but a data folder was given: {root}")
