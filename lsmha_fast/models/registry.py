"""Model names: `cct_7_3x1_32` is 7 blocks, one 3x3 convolution, 32-pixel images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .cct import CCT

# depth -> width, heads and MLP ratio of the published models
SIZES: dict[int, dict[str, Any]] = {
    2: {"dim": 128, "num_heads": 2, "mlp_ratio": 1.0},
    4: {"dim": 128, "num_heads": 2, "mlp_ratio": 1.0},
    6: {"dim": 256, "num_heads": 4, "mlp_ratio": 2.0},
    7: {"dim": 256, "num_heads": 4, "mlp_ratio": 2.0},
    14: {"dim": 384, "num_heads": 6, "mlp_ratio": 3.0},
}
# suffixes of published names that only say which data set the weights are for
DATASET_CLASSES = {"_c100": 100, "_fl": 102}

_NAME = re.compile(r"cct_(\d+)_(\d+)x(\d+)_(\d+)(_sine)?(_c100|_fl)?")


def parse_name(name: str) -> dict[str, Any]:
    """Arguments of `CCT` for a published model name.

    Args:
        name: `cct_{depth}_{kernel}x{convolutions}_{image size}`, then optionally `_sine` for the
            fixed sinusoidal embedding, then `_c100` or `_fl` for the published number of labels.

    Returns:
        Names and values of the arguments.

    Raises:
        ValueError: the name is not of this form, or no such size is published.
    """
    match = _NAME.fullmatch(name)
    depths = ", ".join(map(str, SIZES))
    if match is None:
        raise ValueError(
            f"unknown model {name!r}; names are cct_DEPTH_KERNELxCONVOLUTIONS_SIZE[_sine], "
            f"DEPTH one of {depths}, for example cct_7_3x1_32 or cct_2_3x2_32_sine"
        )
    depth, kernel, convolutions, size = (int(g) for g in match.groups()[:4])
    if depth not in SIZES:
        raise ValueError(f"unknown model {name!r}: depth {depth} is not one of {depths}")
    if kernel % 2 == 0 or convolutions < 1:
        raise ValueError(
            f"unknown model {name!r}: the kernel must be odd and at least one convolution is "
            f"needed, got {kernel}x{convolutions}"
        )
    args = {
        "depth": depth,
        "kernel_size": kernel,
        "num_conv_layers": convolutions,
        "img_size": size,
        "positional_embedding": "sine" if match[5] else "learnable",
        **SIZES[depth],
    }
    if match[6]:
        args["num_classes"] = DATASET_CLASSES[match[6]]
    return args


def create_model(
    name: str,
    num_classes: int | None = None,
    num_heads: int | Sequence[int] | None = None,
    head_dim: int | Sequence[int] | None = None,
    conv_blocks: int = 0,
    **options: Any,
) -> CCT:
    """Make a CCT by its published name.

    Args:
        name: for example "cct_7_3x1_32"; see `parse_name`.
        num_classes: labels K; 100 by default, or what the name's suffix says.
        num_heads: one number, or one per transformer block; the published number by default.
        head_dim: channels of a head, one number or one per transformer block; by default the
            width over `num_heads`.
        conv_blocks: how many of the first blocks are convolutions; their form is chosen by
            `conv_form`, `conv_hidden` and `conv_residual`, see `CCT`.
        **options: other arguments of `CCT`, which win over what the name says.

    Returns:
        The model, with fresh weights, in training mode.

    Raises:
        ValueError: unknown name, or sizes that do not fit.
    """
    args = parse_name(name)
    given = {"num_classes": num_classes, "num_heads": num_heads}
    args |= {k: v for k, v in given.items() if v is not None}
    return CCT(**args | {"head_dim": head_dim, "conv_blocks": conv_blocks} | options)
