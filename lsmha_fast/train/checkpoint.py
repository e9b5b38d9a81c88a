"""Files of a run that are whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a path in the same folder, then move the result to `path`.

    A reader sees the old file or the new one, also after a crash or a kill.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_weights(path: Path, state_dict: dict[str, Tensor]) -> None:
    """Write weights as safetensors."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in state_dict.items()}
    write_atomic(path, lambda part: save_file(tensors, part))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read weights that `save_weights` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write what a run needs to go on: tensors, numbers and strings only."""
    write_atomic(path, lambda part: torch.save(state, part))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; nothing in the file can run code.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise ValueError(f"{path} cannot be read as the state of a run: {error}") from error
