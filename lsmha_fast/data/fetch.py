"""Downloading CIFAR-100: one file, hash-checked, never half-written."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .._files import atomic_file
from .cifar100 import hash_file
from .cifar100_names import BINARY_ARCHIVE, BINARY_BYTES, BINARY_URL, KNOWN_HASHES
from .errors import DatasetError

_TIMEOUT_S = 30
_BLOCK = 1 << 18


def fetch_cifar100(root: str | Path) -> Path:
    """Download the official binary archive into `root`; an archive already there is checked only.

    Args:
        root: folder, made if needed.

    Returns:
        Path of the archive, whose hash was right.

    Raises:
        DatasetError: no network, wrong content or no place to write; nothing is left behind.
    """
    path = Path(root).expanduser() / BINARY_ARCHIVE
    algorithm, expected = KNOWN_HASHES[BINARY_ARCHIVE]
    if path.exists():
        found = hash_file(path, algorithm)
        if found != expected:
            raise DatasetError(
                f"{path} has {algorithm} {found}, expected {expected}; remove it and fetch again"
            )
        return path
    request = importlib.import_module("urllib.request")
    try:
        with request.urlopen(BINARY_URL, timeout=_TIMEOUT_S) as response:
            _store(response, path, expected)
    except DatasetError:
        raise
    except OSError as error:  # URLError, timeouts, resets and a full or read-only disk
        reason = getattr(error, "reason", None) or error
        raise DatasetError(
            f"cannot fetch {BINARY_URL}: {reason}; with a copy from elsewhere, put it at {path}"
        ) from None
    return path


def _store(response: IO[bytes], path: Path, expected: str) -> None:
    """Write to a temporary file beside `path`, check the hash, then rename."""
    with atomic_file(path) as part:
        with part.open("wb") as file, _progress() as advance:
            found, size = _copy(response, file, advance)
        if found != expected:
            raise DatasetError(
                f"{BINARY_URL} sent {size} bytes with sha256 {found}, "
                f"expected {BINARY_BYTES} bytes with {expected}; nothing was kept"
            )


def _copy(source: IO[bytes], target: IO[bytes], advance: Callable[[int], Any]) -> tuple[str, int]:
    """Copy at most one byte more than expected; return sha256 and size."""
    digest, size = hashlib.sha256(), 0
    while size <= BINARY_BYTES and (block := source.read(min(_BLOCK, BINARY_BYTES + 1 - size))):
        target.write(block)
        digest.update(block)
        size += len(block)
        advance(len(block))
    return digest.hexdigest(), size


@contextlib.contextmanager
def _progress():
    """A tqdm bar where tqdm is installed and a terminal is there."""
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        yield lambda count: None
        return
    with tqdm(
        total=BINARY_BYTES, unit="B", unit_scale=True, desc=BINARY_ARCHIVE, disable=None
    ) as bar:
        yield bar.update
