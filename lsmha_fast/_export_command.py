"""`lsmha export`: the model of a run as a file for other programs, checked before it is kept."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ._files import atomic_file
from .data.facts import dataset_facts
from .deploy import export, optimize
from .testing import assert_no_worse
from .train.run import load_run

WRITERS = {
    "safetensors": export.export_safetensors,
    "onnx": export.export_onnx,
    "pt2": export.export_pt2,
}


def export_run(run_dir: Path, format: str, out: Path | None) -> Iterator[str]:
    """Write the model of a run, uint8 images to logits, and a JSON file with labels and shapes.

    Yields lines. The written model is run on random images and compared with the trained one in
    fp64 (at most twice as far from it as the trained one in its own precision); a file that fails
    is deleted.

    Raises:
        ValueError: not a run, or the file computes something else.
    """
    run = load_run(run_dir)
    names, mean, std = dataset_facts(run.config.data, run.config.tier)
    path = out or run_dir / f"model.{format}"
    size = run.model.img_size
    images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8)
    form = optimize(run.model, images, mean=mean, std=std, packed=False)
    WRITERS[format](form, path)
    if format == "safetensors":
        yield f"written: {path} (folded weights; not run again)"
    else:
        logits = (run_onnx if format == "onnx" else run_pt2)(path, images)
        if logits is None:
            yield f"written: {path}; not checked: onnxruntime is not installed"
        else:
            _compare(logits, run.model, images, mean, std, path)
            yield f"written: {path}, checked against the trained model"
    facts = {
        "input": {"shape": ["batch", 3, size, size], "dtype": "uint8", "colours": "RGB"},
        "output": {"shape": ["batch", len(names)], "dtype": "float32", "meaning": "logits"},
        "labels": names,
    }
    side = path.with_suffix(path.suffix + ".json")
    with atomic_file(side) as part:
        part.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    yield f"written: {side}"


def run_onnx(path: Path, images: Tensor) -> Tensor | None:
    """Logits by ONNX Runtime, or None where it is not installed."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None
    session = onnxruntime.InferenceSession(str(path))
    return torch.from_numpy(np.asarray(session.run(None, {export.INPUT: images.numpy()})[0]))


def run_pt2(path: Path, images: Tensor) -> Tensor:
    """Logits by the reloaded program."""
    return torch.export.load(path).module()(images)


@torch.no_grad()
def _compare(logits, model, images, mean, std, path) -> None:
    m, s = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    normalised = (images.double() / 255 - m) / s
    high = copy.deepcopy(model).double()(normalised)
    try:
        assert_no_worse(logits, model(normalised.float()), high)
    except AssertionError as error:
        path.unlink()
        raise ValueError(f"{path}: the written model computes something else: {error}") from error
