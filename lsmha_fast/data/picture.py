"""A contact sheet: what the images of a data set look like, with names one can read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .dataset import ImageDataset
from .errors import DatasetError, require

_GAP = 2  # pixels between images


def contact_sheet(dataset: ImageDataset, path: str | Path, per_class: int = 4) -> Path:
    """Write a PNG with the first images of every class under the class's name.

    Args:
        dataset: any; the title says its name, which says "(generated)" where that is so.
        path: of the PNG; its folder must exist.
        per_class: images of each class, 1 to 20.

    Returns:
        The path.

    Raises:
        DatasetError: bad `per_class`, matplotlib missing, or no place to write.
    """
    if not 1 <= per_class <= 20:
        raise DatasetError(f"per_class must lie in 1..20, got {per_class}")
    figure_module = require("matplotlib.figure", "the contact sheet")
    strips = [_strip(dataset, label, per_class) for label in range(dataset.num_classes)]
    height, width = strips[0].shape[:2]
    columns = max(1, round((len(strips) * height * 1.3 / width) ** 0.5))
    rows = -(-len(strips) // columns)
    scale = max(1.0, 900 / (columns * width)) / 100  # inches per pixel of an image
    # a line of text above each strip takes a fixed height in inches
    text = 0.22
    cell = (width * scale + 0.12, height * scale + text)
    size = (columns * cell[0] + 0.12, rows * cell[1] + 0.55)
    figure = figure_module.Figure(figsize=size, dpi=100)
    figure.text(0.5, 1 - 0.25 / size[1], _title(dataset), ha="center", va="center", fontsize=12)
    for i, strip in enumerate(strips):
        row, column = divmod(i, columns)
        left = (0.12 + column * cell[0]) / size[0]
        top = 1 - (0.5 + row * cell[1]) / size[1]
        axes = figure.add_axes(
            (left, top - cell[1] / size[1], width * scale / size[0], height * scale / size[1])
        )
        axes.imshow(strip, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        axes.set_title(dataset.class_names[i].replace("$", r"\$"), fontsize=8, pad=2)
    return _save(figure, Path(path))


def _strip(dataset: ImageDataset, label: int, per_class: int) -> np.ndarray:
    """The first images of a class side by side, white where there are fewer: (H, W', 3)."""
    _, _, H, W = dataset.images.shape
    index = torch.nonzero(dataset.labels == label).flatten()[:per_class]
    strip = np.full((H, per_class * (W + _GAP) - _GAP, 3), 255, dtype=np.uint8)
    for i, image in enumerate(dataset.images[index]):
        left = i * (W + _GAP)
        strip[:, left : left + W] = image.permute(1, 2, 0).cpu().numpy()
    return strip


def _title(dataset: ImageDataset) -> str:
    H, W = dataset.images.shape[-2:]
    return f"{dataset.name}: {len(dataset)} images {W}x{H}, {dataset.num_classes} classes"


def _save(figure, path: Path) -> Path:
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise DatasetError(f"cannot write {path}: {error.strerror}") from None
    return path
