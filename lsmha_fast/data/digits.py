"""scikit-learn's handwritten digits: 1 797 real 8x8 images in 10 classes, no download."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from ._hashing import make_key, mix64
from .dataset import ImageDataset, channel_stats
from .errors import DatasetError, require

SIDE = 8
# of the pixels and labels as scikit-learn ships them
DIGITS_SHA256 = "65e5b4619795efb40c1082f4c350c049e4ad552200d369b6ae99e21eef5e72c5"
_TEST_SHARE = 5  # one image in five of each class


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) uint8 in 0..16 and (1797,) int64.

    Raises:
        DatasetError: scikit-learn is missing or ships other data.
    """
    bunch = require("sklearn.datasets", "digits").load_digits()
    pixels, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.int64)
    found = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    if found != DIGITS_SHA256:
        raise DatasetError(f"digits: data have sha256 {found}, expected {DIGITS_SHA256}")
    return pixels, labels


def load_digits(split: str, *, size: int = 32) -> ImageDataset:
    """Digits as RGB images, split per class in a fixed way: 1 438 to train on, 359 to test.

    Args:
        split: "train" or "test".
        size: side of the images, a multiple of 8; upsampled bilinearly.

    Raises:
        DatasetError: unknown split, bad size, scikit-learn missing.
    """
    if split not in ("train", "test"):
        raise DatasetError(f"unknown split {split!r}; allowed: train, test")
    if size < SIDE or size % SIDE or size > 256:
        raise DatasetError(f"digits: size must be a multiple of 8 from 8 to 256, got {size}")
    pixels, labels = read_digits()
    images = torch.from_numpy(_upsample(pixels, size // SIDE))[:, None].repeat(1, 3, 1, 1)
    is_test = torch.from_numpy(_test_mask(labels))
    mean, std = channel_stats(images[~is_test])
    chosen = is_test if split == "test" else ~is_test
    return ImageDataset(
        name="digits",
        images=images[chosen],
        labels=torch.from_numpy(labels)[chosen],
        class_names=tuple(str(digit) for digit in range(10)),
        mean=mean,
        std=std,
    )


def _test_mask(labels: np.ndarray) -> np.ndarray:
    """The fifth of each class with the smallest hashes."""
    index = np.arange(len(labels), dtype=np.uint64)
    hashes = mix64(index + make_key("digits split 1"))
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = (len(members) + _TEST_SHARE // 2) // _TEST_SHARE
        mask[members[np.argsort(hashes[members])[:count]]] = True
    return mask


def _upsample(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Bilinear, pixel centres aligned, border repeated: (M, 8, 8) in 0..16 to uint8 in 0..255."""
    side = pixels.shape[-1]
    # position of output pixel i in input pixels is ((2 i + 1) / factor - 1) / 2
    twice = np.clip(2 * np.arange(side * factor) + 1 - factor, 0, 2 * factor * (side - 1))
    left = np.minimum(twice // (2 * factor), side - 2)
    weight = twice - left * 2 * factor
    x = pixels.astype(np.int64)
    for axis in (1, 2):
        w = weight.reshape((-1, 1) if axis == 1 else (-1,))
        x = np.take(x, left, axis) * (2 * factor - w) + np.take(x, left + 1, axis) * w
    return (x * 255 // (16 * (2 * factor) ** 2)).astype(np.uint8)
