"""Decoded uint8 images beside their slow-to-read source, with a hash of their own.

A cache that is absent, stale, damaged or not writable is never an error: the source is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .._files import atomic_file

FOLDER = ".lsmha-cache"


def fingerprint(files: Iterable[Path]) -> str:
    """Changes when any file is added, removed, renamed, resized or rewritten."""
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read(path: Path, source: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Images (M, 3, H, W) and labels (M,) written for the same `source`, or None."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            images, labels = stored["images"], stored["labels"]
            if str(stored["sha256"]) == _digest(source, images, labels):
                return images, labels
    except Exception:  # whatever is wrong with a cache, the source is still there
        pass
    return None


def write(path: Path, source: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Store atomically where the folder is writable, else do nothing."""
    with contextlib.suppress(OSError), atomic_file(path) as part, part.open("wb") as file:
        np.savez(file, images=images, labels=labels, sha256=_digest(source, images, labels))


def _digest(source: str, images: np.ndarray, labels: np.ndarray) -> str:
    digest = hashlib.sha256(f"{source} {images.shape} {labels.shape}".encode())
    for array in (images, labels):
        digest.update(np.ascontiguousarray(array).reshape(-1).data)
    return digest.hexdigest()
