"""Weights as safetensors and the state of a run, each file whole or absent.

The manifest is written last and holds the hash of every state, newest first: what it names was
on the disk before it. A reader takes the newest state whose hash is right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import atomic_file

MANIFEST = "manifest.json"
KEEP = 2  # states


def save_weights(path: Path, state_dict: dict[str, Tensor]) -> None:
    """Write weights as safetensors.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in state_dict.items()}
    _write(path, lambda part: save_file(tensors, part))


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


def save_state(path: Path, state: dict[str, Any]) -> str:
    """Write what a run needs to go on: tensors, numbers and strings only.

    Returns:
        The file's SHA-256.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    digest = ""

    def write(part: Path) -> None:
        nonlocal digest
        torch.save(state, part)
        digest = _sha256(part)

    _write(path, write)
    return digest


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; nothing in the file can run code.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise ValueError(f"{path} cannot be read as the state of a run: {error}") from error


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Add a state to a run folder and drop all but the last two.

    Raises:
        OSError: the disk is full or the folder cannot be written; the states before are intact.
    """
    name = f"state-{state['epoch']:05d}-{state['step']:06d}.pt"
    entry = {"file": name, "epoch": state["epoch"], "step": state["step"]}
    entry["sha256"] = save_state(folder / name, state)
    older = [old for old in read_manifest(folder) if old["file"] != name]
    kept = [entry, *older[: KEEP - 1]]
    text = json.dumps({"version": 1, "states": kept}, indent=2) + "\n"
    _write(folder / MANIFEST, lambda part: part.write_text(text))
    for path in folder.glob("state-*.pt"):
        if path.name not in {old["file"] for old in kept}:
            path.unlink(missing_ok=True)
    for path in folder.glob(".*.part"):  # of a process that was killed while it wrote
        path.unlink(missing_ok=True)


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """States of a run, newest first; none where there is no manifest.

    Raises:
        ValueError: the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return []
    try:
        states = json.loads(path.read_text())["states"]
        return [{key: s[key] for key in ("file", "epoch", "step", "sha256")} for s in states]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest whole state of a run; None where it never came to save one.

    Raises:
        ValueError: all are damaged, or were written by an older version.
    """
    states = read_manifest(folder)
    if not states and (folder / "state.pt").exists():
        raise ValueError(f"{folder}/state.pt is of an older version and cannot go on: train anew")
    if not states:
        return None
    for entry in states:
        path = folder / Path(entry["file"]).name
        if path.is_file() and _sha256(path) == entry["sha256"]:
            return load_state(path)
    raise ValueError(f"{folder}: none of the {len(states)} states in {MANIFEST} is whole")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """`write` into an atomic file; what a library makes of a full disk becomes an OSError."""
    from safetensors import SafetensorError

    try:
        with atomic_file(path) as part:
            write(part)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OSError(f"cannot write {path}: {reason}") from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
