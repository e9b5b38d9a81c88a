"""Named members of a .tar.gz into memory: nothing is unpacked to disk, links are never followed."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

from .errors import DatasetError, one_line

MAX_UNPACKED = 512 << 20  # of one archive; CIFAR-100's have 185 MB


class _Capped(io.RawIOBase):
    """A reader that fails once more than `MAX_UNPACKED` bytes were read: no gzip bombs."""

    def __init__(self, source: gzip.GzipFile) -> None:
        self._source, self._left = source, MAX_UNPACKED

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise DatasetError(f"holds more than {MAX_UNPACKED} bytes")
        return data


def read_members(path: Path, sizes: dict[str, int]) -> dict[str, bytes]:
    """Contents of regular files inside a .tar.gz.

    Args:
        path: the archive.
        sizes: exact member name -> largest size in bytes.

    Raises:
        DatasetError: a member is missing, is no regular file or is too large, or the archive is
            broken or unreasonably large.
    """
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path) as unzipped, _open_tar(_Capped(unzipped)) as tar:
            for member in tar:
                if member.name in sizes:
                    found[member.name] = _read(tar, member, sizes[member.name])
                    if len(found) == len(sizes):
                        break
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from None
    except Exception as error:  # tarfile, gzip and zlib each have their own errors
        raise DatasetError(f"{path}: broken archive: {one_line(error)}") from None
    missing = sorted(set(sizes) - set(found))
    if missing:
        raise DatasetError(f"{path}: has no {', '.join(missing)}")
    return found


def _open_tar(stream: _Capped) -> tarfile.TarFile:
    return tarfile.open(fileobj=stream, mode="r|")  # type: ignore[call-overload]


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    if not member.isreg():
        raise DatasetError(f"{member.name} is not a regular file")
    if member.size > limit:
        raise DatasetError(f"{member.name} has {member.size} bytes, at most {limit} are allowed")
    source = tar.extractfile(member)
    data = source.read() if source else b""
    if len(data) != member.size:
        raise DatasetError(f"{member.name} is cut off after {len(data)} of {member.size} bytes")
    return data
