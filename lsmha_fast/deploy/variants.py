"""The forms of one model whose latency is compared: ours, and the baselines."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models import CCT
from .export import INPUT, export_onnx
from .optimize import optimize
from .published import with_published_attention
from .runner import Runner

# a call on images of a fixed batch, which returns when the logits are there
Call = Callable[[], object]
Maker = Callable[[CCT, Tensor, torch.dtype], Call]


class Unavailable(RuntimeError):
    """A variant that this machine cannot run, with the reason."""


def _converted(model: CCT, images: Tensor, dtype: torch.dtype) -> tuple[CCT, Tensor]:
    made = copy.deepcopy(model).to(images.device, dtype).eval()
    return made, images.to(dtype)


def _waiting(run: Callable[[Tensor], Tensor], images: Tensor) -> Call:
    """`run` on the images, without gradients, and a wait where the device works on its own."""

    @torch.inference_mode()
    def call() -> Tensor:
        logits = run(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        return logits

    return call


def _optimized(model: CCT, images: Tensor, dtype: torch.dtype) -> Call:
    form = optimize(model, images, dtype=dtype)
    if images.is_cuda:  # with the copies to and from the host, as `Runner` is used
        runner, on_host = Runner(form, len(images)), images.cpu()
        return lambda: runner(on_host)
    return _waiting(form, images)


def _eager(model: CCT, images: Tensor, dtype: torch.dtype) -> Call:
    return _waiting(*_converted(model, images, dtype))


def _compiled(model: CCT, images: Tensor, dtype: torch.dtype) -> Call:
    made, images = _converted(model, images, dtype)
    if images.is_cuda:
        return _waiting(torch.compile(made, mode="max-autotune", dynamic=False), images)
    # constant weights, which Inductor then sorts for oneDNN as `optimize` does
    options: dict[str, Any] = {"freezing": True}
    return _waiting(torch.compile(made, options=options, dynamic=False), images)


def _published(model: CCT, images: Tensor, dtype: torch.dtype) -> Call:
    return _eager(with_published_attention(model), images, dtype)


def _published_compiled(model: CCT, images: Tensor, dtype: torch.dtype) -> Call:
    return _compiled(with_published_attention(model), images, dtype)


def _onnxruntime(model: CCT, images: Tensor, dtype: torch.dtype) -> Call:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise Unavailable("onnxruntime is not installed") from error
    if images.is_cuda or dtype != torch.float32:
        raise Unavailable("measured in float32 on a CPU alone")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(optimize(model, images, packed=False), path)
        session = onnxruntime.InferenceSession(str(path), options)
    array = np.ascontiguousarray(images.numpy())
    return lambda: torch.from_numpy(session.run(None, {INPUT: array})[0])


# name -> how to make it; the first is ours
VARIANTS: Mapping[str, Maker] = {
    "optimized": _optimized,
    "eager": _eager,
    "compiled": _compiled,
    "published": _published,
    "published compiled": _published_compiled,
    "onnxruntime": _onnxruntime,
}
