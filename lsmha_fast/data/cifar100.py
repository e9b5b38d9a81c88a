"""CIFAR-100 from whatever is in the data folder, verified before it is used.

Layouts, in the order of preference: the binary archive, its unpacked files, the python archive, its
unpacked files, parquet files as on the Hugging Face hub, folders `train/<class>/*.png`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import cache
from . import cifar100_names as official
from . import cifar100_readers as readers
from .archives import read_members
from .cifar100_readers import RawSplit
from .dataset import ImageDataset
from .errors import DatasetError

_MAX_NAMES_BYTES = 1 << 16
_MAX_PICKLE_BYTES = 160 << 20
_LOOKED_FOR = (
    f"{official.BINARY_ARCHIVE}, train.bin and test.bin, {official.PYTHON_ARCHIVE}, "
    "train, test and meta, train-*.parquet and test-*.parquet, train/<class>/*.png"
)


@dataclass(frozen=True)
class Layout:
    """Where the data are and how they are read.

    Attributes:
        kind: "binary archive", "binary", "python archive", "python", "parquet" or "folder".
        folder: the folder that holds the files.
        hashed: files whose hash is published.
    """

    kind: str
    folder: Path
    hashed: tuple[str, ...] = ()


def find_layout(root: Path) -> Layout:
    """The first known layout in `root` or in the subfolder that its archive unpacks to.

    Raises:
        DatasetError: no such folder, or nothing known in it.
    """
    if not root.is_dir():
        raise DatasetError(f"cifar100: no folder {root}")
    for layout in _candidates(root):
        if _present(layout):
            return layout
    raise DatasetError(f"cifar100: nothing known in {root}; looked for {_LOOKED_FOR}")


def load_cifar100(split: str, root: Path | None, *, allow_unverified: bool = False) -> ImageDataset:
    """Read one split of CIFAR-100 with its coarse labels.

    Args:
        split: "train" or "test".
        root: folder with one of the layouts above.
        allow_unverified: accept files that differ from the published ones, with a warning.

    Raises:
        DatasetError: nothing found, a wrong hash, a damaged or unexpected file.
    """
    if split not in official.COUNTS:
        raise DatasetError(f"unknown split {split!r}; allowed: train, test")
    layout = find_layout(_need_root(root))
    notes = check_hashes(layout, allow_unverified, split)
    raw = read_split(layout, split)
    notes += check_split(raw, split, allow_unverified)
    for note in notes:
        if note.startswith("unverified"):
            warnings.warn(f"cifar100: {note}", stacklevel=2)
    fine = torch.from_numpy(raw.fine)
    return ImageDataset(
        name="cifar100",
        images=torch.from_numpy(raw.images),
        labels=fine,
        class_names=official.FINE_NAMES,
        mean=official.MEAN,
        std=official.STD,
        coarse_labels=torch.tensor(official.COARSE_OF_FINE)[fine],
        coarse_names=official.COARSE_NAMES,
    )


def verify_cifar100(root: Path | None, allow_unverified: bool = False) -> list[str]:
    """Check everything there is to check; lines for people to read.

    Raises:
        DatasetError: the first thing that is wrong.
    """
    layout = find_layout(_need_root(root))
    lines = [f"layout: {layout.kind} in {layout.folder}"]
    lines += check_hashes(layout, allow_unverified)
    for split in official.COUNTS:
        raw = read_split(layout, split, use_cache=False)
        lines += check_split(raw, split, allow_unverified)
        lines.append(f"{split}: {len(raw.images)} images, labels in range, groups consistent")
    return lines


def check_hashes(layout: Layout, allow_unverified: bool, split: str | None = None) -> list[str]:
    """Compare files with their published hashes; of a split, only the files it needs.

    Returns:
        One line per file; "unverified: ..." for each difference that was allowed.
    """
    if not layout.hashed:
        return [f"{layout.kind}: no published hashes, contents checked only"]
    other = {"train": "test", "test": "train"}.get(split or "")
    lines = []
    for name in layout.hashed:
        if name == other:
            continue
        algorithm, expected = official.KNOWN_HASHES[name]
        found = hash_file(layout.folder / name, algorithm)
        if found == expected:
            lines.append(f"{name}: {algorithm} matches")
            continue
        message = f"{layout.folder / name} has {algorithm} {found}, expected {expected}"
        if not allow_unverified:
            raise DatasetError(f"cifar100: {message}")
        lines.append(f"unverified: {message}")
    return lines


def check_split(raw: RawSplit, split: str, allow_unverified: bool) -> list[str]:
    """Label range, hierarchy, and numbers of images; returns "unverified: ..." lines."""
    if len(raw.fine) and not 0 <= raw.fine.min() <= raw.fine.max() < len(official.FINE_NAMES):
        raise DatasetError(
            f"cifar100 {split}: labels must lie in 0..99, got {raw.fine.min()}..{raw.fine.max()}"
        )
    expected = np.array(official.COARSE_OF_FINE)[raw.fine]
    if raw.coarse is not None and (raw.coarse != expected).any():
        first = int(np.flatnonzero(raw.coarse != expected)[0])
        raise DatasetError(
            f"cifar100 {split}: image {first} has class {official.FINE_NAMES[raw.fine[first]]} but "
            f"group {raw.coarse[first]}, expected group {expected[first]}"
        )
    per_class = official.COUNTS[split] // len(official.FINE_NAMES)
    counts = np.bincount(raw.fine, minlength=len(official.FINE_NAMES))
    if (counts == per_class).all():
        return []
    message = (
        f"{split} has {counts.sum()} images, {counts.min()} to {counts.max()} per class, "
        f"expected {per_class} of each"
    )
    if not allow_unverified:
        raise DatasetError(f"cifar100: {message}")
    return [f"unverified: {message}"]


def read_split(layout: Layout, split: str, *, use_cache: bool = True) -> RawSplit:
    """Read a split in any layout; the slow ones keep a cache beside the files."""
    try:
        if layout.kind in _BYTE_READERS:
            return _BYTE_READERS[layout.kind](layout, split)
        return _read_images(layout, split, use_cache)
    except OSError as error:
        raise DatasetError(f"cifar100: cannot read {error.filename}: {error.strerror}") from None


def hash_file(path: Path, algorithm: str) -> str:
    """Hex digest of a file."""
    try:
        digest = hashlib.new(algorithm, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()


def _need_root(root: Path | None) -> Path:
    if root is None:
        raise DatasetError(
            "cifar100 needs the folder with its files (--data-root DIR); "
            "`lsmha data fetch cifar100 --data-root DIR` downloads them"
        )
    return root


def _candidates(root: Path) -> list[Layout]:
    binary, python = root / "cifar-100-binary", root / "cifar-100-python"
    return [
        Layout("binary archive", root, (official.BINARY_ARCHIVE,)),
        *(Layout("binary", folder) for folder in (root, binary)),
        Layout("python archive", root, (official.PYTHON_ARCHIVE,)),
        *(Layout("python", folder, ("train", "test", "meta")) for folder in (root, python)),
        *(Layout("parquet", folder) for folder in (root, root / "cifar100", root / "data")),
        *(Layout("folder", folder) for folder in (root, root / "cifar100")),
    ]


def _present(layout: Layout) -> bool:
    folder = layout.folder
    if layout.hashed:
        return all((folder / name).is_file() for name in layout.hashed)
    if layout.kind == "binary":
        return all((folder / f"{split}.bin").is_file() for split in official.COUNTS)
    if layout.kind == "parquet":
        return all(_parquet_files(folder, split) for split in official.COUNTS)
    return all((folder / split).is_dir() for split in official.COUNTS)


def _parquet_files(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"{split}-*.parquet"))


def _read_binary_archive(layout: Layout, split: str) -> RawSplit:
    path, inside = layout.folder / official.BINARY_ARCHIVE, "cifar-100-binary"
    names = [f"{inside}/fine_label_names.txt", f"{inside}/coarse_label_names.txt"]
    data = f"{inside}/{split}.bin"
    sizes = {
        data: official.COUNTS[split] * readers.RECORD,
        **dict.fromkeys(names, _MAX_NAMES_BYTES),
    }
    members = read_members(path, sizes)
    readers.check_text_names(members[names[0]], members[names[1]], str(path))
    return readers.read_binary(members[data], f"{path}: {data}")


def _read_binary_files(layout: Layout, split: str) -> RawSplit:
    names = [layout.folder / f"{level}_label_names.txt" for level in ("fine", "coarse")]
    texts = [_read_capped(path, _MAX_NAMES_BYTES) for path in names if path.is_file()]
    if len(texts) == 2:
        readers.check_text_names(texts[0], texts[1], str(layout.folder))
    path = layout.folder / f"{split}.bin"
    data = _read_capped(path, official.COUNTS[split] * readers.RECORD)
    return readers.read_binary(data, str(path))


def _read_python_archive(layout: Layout, split: str) -> RawSplit:
    path = layout.folder / official.PYTHON_ARCHIVE
    names = [f"cifar-100-python/{name}" for name in (split, "meta")]
    members = read_members(
        path, dict(zip(names, (_MAX_PICKLE_BYTES, _MAX_NAMES_BYTES), strict=True))
    )
    readers.check_python_names(members[names[1]], f"{path}: {names[1]}")
    return readers.read_python(members[names[0]], f"{path}: {names[0]}")


def _read_python_files(layout: Layout, split: str) -> RawSplit:
    meta, path = layout.folder / "meta", layout.folder / split
    readers.check_python_names(_read_capped(meta, _MAX_NAMES_BYTES), str(meta))
    return readers.read_python(_read_capped(path, _MAX_PICKLE_BYTES), str(path))


def _read_capped(path: Path, limit: int) -> bytes:
    size = path.stat().st_size
    if size > limit:
        raise DatasetError(f"{path} has {size} bytes, at most {limit} are allowed")
    return path.read_bytes()


_BYTE_READERS: dict[str, Callable[[Layout, str], RawSplit]] = {
    "binary archive": _read_binary_archive,
    "binary": _read_binary_files,
    "python archive": _read_python_archive,
    "python": _read_python_files,
}


def _read_images(layout: Layout, split: str, use_cache: bool) -> RawSplit:
    """Parquet or folder: decoding 50 000 PNG takes seconds, so the result is kept."""
    if layout.kind == "parquet":
        paths = _parquet_files(layout.folder, split)
    else:
        labelled = readers.folder_files(layout.folder / split)
        paths = [path for path, _ in labelled]
    source = cache.fingerprint(paths)
    cached = layout.folder / cache.FOLDER / f"cifar100-{layout.kind}-{split}.npz"
    if use_cache and (stored := cache.read(cached, source)):
        return RawSplit(*stored, None)
    if layout.kind == "parquet":
        raw = _join([readers.read_parquet(path) for path in paths])
    else:
        raw = readers.read_folder(labelled)
    check_split(raw, split, allow_unverified=True)  # the groups are not in the cache
    if use_cache:
        cache.write(cached, source, raw.images, raw.fine)
    return raw


def _join(parts: list[RawSplit]) -> RawSplit:
    images, fine, coarse = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return RawSplit(images, fine, coarse)
