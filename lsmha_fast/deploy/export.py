"""A model leaves Python: safetensors, ONNX, and torch.export's pt2 in standard operators."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .._files import atomic_file
from ..ops import attention_decompositions
from ..ops._dispatch import overloads
from .form import InferenceCCT

FORMATS = ("safetensors", "onnx", "pt2")
# the first with a Gelu operator
OPSET = 20
INPUT, OUTPUT = "images", "logits"


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """The ops of this package that an inference form calls, in standard operators."""
    ops = torch.ops.lsmha_fast
    return {
        **attention_decompositions(),
        **overloads(ops.conv_stem, _conv_stem),
        **overloads(ops.seq_pool, _seq_pool),
    }


def _conv_stem(x, weight, bias, stride, padding, pool, need_codes, backend):
    if need_codes:
        raise ValueError("conv_stem has no standard form that keeps what its gradient needs")
    image = F.max_pool2d(F.relu(F.conv2d(x, weight, bias, stride, padding)), *pool)
    return image.flatten(2).transpose(1, 2).contiguous(), x.new_empty(0, dtype=torch.uint8)


def _seq_pool(x: Tensor, weight: Tensor, backend: str):
    acc = torch.promote_types(x.dtype, torch.float32)
    score = (x.to(acc) * weight.to(acc)).sum(-1)  # (B, N, H)
    p = torch.softmax(score, dim=1)
    return (p[..., None] * x.to(acc)).sum(1), torch.logsumexp(score, dim=1)


@torch.no_grad()
def export_program(form: InferenceCCT) -> torch.export.ExportedProgram:
    """The plain (not packed) inference form as a program of standard operators, any batch size."""
    images = torch.zeros(2, *form.image_shape, dtype=form.image_dtype)
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(form, (images,), dynamic_shapes=(batch,))
    return program.run_decompositions(decompositions())


def export_onnx(form: InferenceCCT, path: Path) -> None:
    """Write an ONNX file whose input is `images` (batch, 3, H, W) and output `logits` (batch, K).

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            export_program(form),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise ValueError("torch.onnx.export returned no program")
    with atomic_file(path) as part:
        program.save(str(part))


def export_pt2(form: InferenceCCT, path: Path) -> None:
    """Write a torch.export archive; `torch.export.load` runs it without this package."""
    program = export_program(form)
    with atomic_file(path) as part, part.open("wb") as file:
        torch.export.save(program, file)  # by name it would insist on its own suffix


def export_safetensors(form: InferenceCCT, path: Path) -> None:
    """Write the folded weights by name, for programs that bring the arithmetic themselves."""
    from safetensors.torch import save_file

    with atomic_file(path) as part:
        save_file({k: v.contiguous() for k, v in form.state_dict().items()}, part)
