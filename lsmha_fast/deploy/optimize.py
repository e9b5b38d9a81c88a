"""`optimize`: a trained CCT in its fastest form for inference on one device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models import CCT
from .form import InferenceCCT
from .layers import pack, packing_missing
from .native import nativise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def optimize(
    model: nn.Module,
    example: Tensor,
    *,
    dtype: torch.dtype | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    packed: bool = True,
) -> InferenceCCT:
    """Fold, convert and pack a trained CCT for inference.

    The function of the images stays the same: BatchNorm goes into the convolutions, LayerNorm's
    affine parts into the products that follow where nothing else reads them, the softmax scale
    into the query projection, the final norm through the pooling into the classifier, and heads
    whose output is multiplied by zeros are left out. Folding is done in fp64 and rounded once.

    Args:
        model: a CCT, hybrids included; it is left as it is.
        example: images (B, 3, H, W) on the device to run on; B is the batch to pack weights for.
        dtype: float32, bfloat16, or on a GPU float16; by default the model's.
        mean, std: per channel; then the form takes uint8 images and normalises them,
            (x / 255 - mean) / std, inside its first convolution.
        packed: on a CPU, sort the weights for its products: of a transformer block for one native
            call, of the rest for oneDNN, each where it can; such a form cannot be moved, exported
            or pickled.

    Returns:
        A module from images to logits (B, K) float32.

    Raises:
        ValueError: not a CCT, or images, dtype or normalisation that do not fit.
    """
    if not isinstance(model, CCT):
        raise ValueError(f"optimize: expected a CCT, got {type(model).__name__}")
    if (mean is None) != (std is None):
        raise ValueError(f"optimize: mean and std go together, got {mean=} {std=}")
    dtype = model.fc.weight.dtype if dtype is None else dtype
    device = example.device
    if dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"optimize: dtype must be float32, bfloat16 or float16, got {dtype}")
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("optimize: float16 needs a GPU; on a CPU use float32 or bfloat16")
    form = InferenceCCT(model, dtype, mean, std).to(device).eval()
    if packed and device.type == "cpu":
        nativise(form)
        if packing_missing(dtype) is None:
            pack(form, max(len(example), 1), model.grid[0] * model.grid[1])
    form(example)  # says at once what does not fit
    return form
