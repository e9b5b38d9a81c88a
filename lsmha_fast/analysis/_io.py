"""Files of the analysis: written whole or not at all, read back without executing anything."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .._files import atomic_file

# what a damaged or foreign .npz raises, by where the damage is
_DAMAGE = (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError, TypeError)


def save_npz(path: str | Path, arrays: Mapping[str, np.ndarray], info: Mapping) -> None:
    """Write arrays and a JSON record into one .npz, so that they cannot come apart."""
    record = np.array(json.dumps(info))
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, info=record, **arrays)


def load_npz(path: str | Path, kind: str) -> tuple[dict[str, np.ndarray], dict]:
    """Read what `save_npz` wrote: (arrays, JSON record).

    Arrays named `matrices...` are derived from the others and are not read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or is not of this `kind`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {kind} file")
    try:
        with np.load(path, allow_pickle=False) as file:
            info = json.loads(str(file["info"]))
            found = info["kind"]
            arrays = {n: file[n] for n in file.files if n.split(".")[0] not in ("info", "matrices")}
    except _DAMAGE as error:
        raise ValueError(f"{path}: not a readable {kind} file ({error})") from error
    if found != kind:
        raise ValueError(f"{path}: holds {found!r}, expected {kind!r}")
    return arrays, info
