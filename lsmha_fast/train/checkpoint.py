"""Weights as safetensors and the state of a run, each file whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import atomic_file


def save_weights(path: Path, state_dict: dict[str, Tensor]) -> None:
    """Write weights as safetensors."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in state_dict.items()}
    with atomic_file(path) as part:
        save_file(tensors, part)


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
    with atomic_file(path) as part:
        torch.save(state, part)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; nothing in the file can run code.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise ValueError(f"{path} cannot be read as the state of a run: {error}") from error
