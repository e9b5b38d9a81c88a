"""CIFAR-100's four formats, each to the same three arrays.

A reader checks what its format can get wrong (sizes, types, names); what all share (label range,
counts, hierarchy) is checked in `cifar100.py`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .cifar100_names import COARSE_NAMES, COUNTS, FINE_NAMES, PIXELS, SIDE
from .errors import DatasetError, one_line, require
from .pickles import safe_load, to_uint8

RECORD = 2 + PIXELS  # coarse label, fine label, pixels
MAX_IMAGE_BYTES = 1 << 16  # a 32x32 PNG needs some 3 kB
_MAX_PARQUET_BYTES = 1 << 30


class RawSplit(NamedTuple):
    """Images (M, 3, 32, 32) uint8, fine labels (M,) int64, coarse labels likewise or None."""

    images: np.ndarray
    fine: np.ndarray
    coarse: np.ndarray | None


def read_binary(data: bytes, where: str) -> RawSplit:
    """Fixed-size records of the binary layout."""
    count, rest = divmod(len(data), RECORD)
    if rest or not count:
        raise DatasetError(
            f"{where}: {len(data)} bytes are not a whole number of {RECORD}-byte records"
        )
    records = np.frombuffer(data, dtype=np.uint8).reshape(count, RECORD)
    images = np.ascontiguousarray(records[:, 2:]).reshape(count, 3, SIDE, SIDE)
    return RawSplit(images, records[:, 1].astype(np.int64), records[:, 0].astype(np.int64))


def read_python(data: bytes, where: str) -> RawSplit:
    """The pickled dictionary of the python layout, through the restricted unpickler."""
    content = _load_dict(data, where, ("data", "fine_labels", "coarse_labels"))
    pixels = to_uint8(content["data"])
    if pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise DatasetError(f"{where}: data must be (M, {PIXELS}), got {pixels.shape}")
    fine, coarse = (
        _label_list(content[key], len(pixels), f"{where}: {key}")
        for key in ("fine_labels", "coarse_labels")
    )
    return RawSplit(pixels.reshape(-1, 3, SIDE, SIDE).copy(), fine, coarse)


def check_text_names(fine: bytes, coarse: bytes, where: str) -> None:
    """The name files of the binary layout must hold the official names in the official order."""
    lines = [text.decode("utf-8", "replace").split() for text in (fine, coarse)]
    _check_names(lines[0], lines[1], where)


def check_python_names(meta: bytes, where: str) -> None:
    """Likewise for the pickled `meta` of the python layout."""
    content = _load_dict(meta, where, ("fine_label_names", "coarse_label_names"))
    _check_names(content["fine_label_names"], content["coarse_label_names"], where)


def read_parquet(path: Path) -> RawSplit:
    """A split of the Hugging Face layout: PNG bytes, fine and coarse labels."""
    parquet = require("pyarrow.parquet", "the parquet layout of cifar100")
    try:
        with parquet.ParquetFile(path) as file:
            column = _check_parquet(file, path)
            images, fine, coarse = [], [], []
            for batch in file.iter_batches(1000, columns=[column, "fine_label", "coarse_label"]):
                images += [decode_png(cell["bytes"], str(path)) for cell in batch[0].to_pylist()]
                fine += batch[1].to_pylist()
                coarse += batch[2].to_pylist()
    except DatasetError:
        raise
    except Exception as error:  # Arrow's errors have no common base
        raise DatasetError(f"{path}: broken parquet: {one_line(error)}") from None
    labels = [_label_list(v, len(images), str(path)) for v in (fine, coarse)]
    return RawSplit(np.stack(images), *labels)


def folder_files(folder: Path) -> list[tuple[Path, int]]:
    """PNG files of a folder of class folders with their labels, by class, then by file name.

    Raises:
        DatasetError: a folder is no class of CIFAR-100, or there is no image.
    """
    files: list[tuple[Path, int]] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        if entry.name not in FINE_NAMES:
            raise DatasetError(f"{entry}: {entry.name!r} is not one of CIFAR-100's class names")
        label = FINE_NAMES.index(entry.name)
        files += [(file, label) for file in sorted(entry.glob("*.png"))]
    if not files:
        raise DatasetError(f"{folder}: no <class>/*.png in it")
    return files


def read_folder(files: Sequence[tuple[Path, int]]) -> RawSplit:
    """Decode the files that `folder_files` found."""
    images = []
    for path, _ in files:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise DatasetError(f"{path}: larger than {MAX_IMAGE_BYTES} bytes")
        images.append(decode_png(path.read_bytes(), str(path)))
    return RawSplit(np.stack(images), np.array([label for _, label in files], np.int64), None)


def decode_png(data: Any, where: str) -> np.ndarray:
    """PNG bytes to (3, 32, 32) uint8; the size is known before any pixel is decoded."""
    image_module = require("PIL.Image", "PNG images of cifar100")
    if not isinstance(data, bytes) or len(data) > MAX_IMAGE_BYTES:
        raise DatasetError(f"{where}: an image is not at most {MAX_IMAGE_BYTES} bytes of PNG")
    try:
        image = image_module.open(io.BytesIO(data), formats=["PNG"])
        size, mode = image.size, image.mode
        if size == (SIDE, SIDE) and mode == "RGB":
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise DatasetError(f"{where}: broken PNG: {one_line(error)}") from None
    raise DatasetError(f"{where}: a PNG is {size[0]}x{size[1]} {mode}, expected {SIDE}x{SIDE} RGB")


def _load_dict(data: bytes, where: str, keys: Sequence[str]) -> dict[Any, Any]:
    try:
        content = safe_load(data)
    except DatasetError as error:
        raise DatasetError(f"{where}: {error}") from None
    if not isinstance(content, dict) or not set(keys) <= set(content):
        raise DatasetError(f"{where}: not a dictionary with {', '.join(keys)}")
    return content


def _label_list(values: Any, count: int, where: str) -> np.ndarray:
    """Labels as int64; every one must be an int in 0..255, one per image."""
    good = isinstance(values, list) and all(type(v) is int and 0 <= v < 256 for v in values)
    if not good or len(values) != count:
        raise DatasetError(f"{where}: expected {count} integer labels")
    return np.array(values, dtype=np.int64)


def _check_names(fine: Any, coarse: Any, where: str) -> None:
    if list(fine) != list(FINE_NAMES) or list(coarse) != list(COARSE_NAMES):
        raise DatasetError(f"{where}: the class names are not CIFAR-100's in their official order")


def _check_parquet(file: Any, path: Path) -> str:
    """Name of the image column, after sizes and columns were found reasonable."""
    names = file.schema_arrow.names
    column = "img" if "img" in names else "image"
    needed = (column, "fine_label", "coarse_label")
    if not set(needed) <= set(names):
        raise DatasetError(f"{path}: expected columns img, fine_label, coarse_label; got {names}")
    meta = file.metadata
    size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    if not 0 < meta.num_rows <= COUNTS["train"] or size > _MAX_PARQUET_BYTES:
        raise DatasetError(f"{path}: {meta.num_rows} rows of {size} bytes are not CIFAR-100")
    return column
