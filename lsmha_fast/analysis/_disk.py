"""Batches of tensors in files, within a budget of bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class StoredBatch(NamedTuple):
    """Where the features of one batch lie: labels first, then the heads of every block."""

    path: Path
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    def read(self, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
        """(heads of every block, labels) on `device`."""
        content = torch.from_file(
            str(self.path), shared=False, size=self.path.stat().st_size, dtype=torch.uint8
        )
        tensors, start = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            end = start + shape.numel() * dtype.itemsize
            tensors.append(content[start:end].view(dtype).view(shape).to(device))
            start = end
        labels, *heads = tensors
        return tuple(heads), labels


class DiskStore:
    """Writes batches into a temporary folder until `budget` bytes are used.

    Args:
        budget: bytes of all files together; 0 makes no folder.
        folder: where the temporary folder is made; by default where such things go.
    """

    def __init__(self, budget: int, folder: str | Path | None = None):
        self.budget = self.room = budget
        self.parent = folder
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.count = 0

    def write(self, features: tuple[tuple[Tensor, ...], Tensor]) -> StoredBatch | None:
        """Store one batch, or None where it does not fit.

        Raises:
            OSError: the folder cannot be written.
        """
        heads, labels = features
        tensors = [t.cpu().contiguous() for t in (labels, *heads)]
        size = sum(t.nbytes for t in tensors)
        if size > self.room:
            return None
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="lsmha-heads-", dir=self.parent)
        path = Path(self.folder.name) / f"{self.count}.bin"
        with path.open("wb") as file:
            for t in tensors:
                file.write(t.flatten().view(torch.uint8).numpy().data if t.numel() else b"")
        self.room -= size
        self.count += 1
        shapes, dtypes = tuple(t.shape for t in tensors), tuple(t.dtype for t in tensors)
        return StoredBatch(path, shapes, dtypes)

    def clear(self) -> None:
        """Delete all files."""
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None
        self.room, self.count = self.budget, 0
