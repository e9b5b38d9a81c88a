"""What a model costs: multiply-adds of one image, and measured times side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import prod
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of one forward pass, the products of attention included.

    Matrix products and convolutions are counted, as by `torch.utils.flop_counter`; softmax, norms
    and activations are not.

    Args:
        model: run in evaluation mode, mode restored.
        image: one image with its batch dimension, on the model's device.

    Returns:
        Multiply-adds of this image.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False, custom_mapping=_FLOPS)
    training = model.training
    with counter, torch.no_grad():
        model.eval()(image)
    model.train(training)
    return counter.get_total_flops() // 2


def interleaved_medians(
    functions: Sequence[Callable[[], object]], *, rounds: int, device: torch.device
) -> list[float]:
    """Median seconds of each function, called in turn `rounds` times after one warm-up.

    Taking turns spreads what else happens on the machine over all of them.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    for number in range(rounds + 1):
        for function, row in zip(functions, seconds, strict=True):
            _wait(device)
            start = time.perf_counter()
            function()
            _wait(device)
            if number:
                row.append(time.perf_counter() - start)
    return [median(row) for row in seconds]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _attention(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    B, H, L, D = q
    return 4 * B * H * L * k[2] * D


def _attention_packed(qkv: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    B, N, _, H, D = qkv
    return 4 * B * H * N * N * D


def _conv_stem(
    x: Any, weight: Any, bias: Any, stride: int, padding: int, *rest: Any, **options: Any
) -> int:
    sides = ((side + 2 * padding - weight[-1]) // stride + 1 for side in x[2:])
    return 2 * x[0] * prod(sides) * prod(weight)


def _seq_pool(x: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return 4 * prod(x)


# flops by op, in the form that FlopCounterMode asks for
_FLOPS = {
    torch.ops.lsmha_fast.attention: _attention,
    torch.ops.lsmha_fast.attention_packed: _attention_packed,
    torch.ops.lsmha_fast.conv_stem: _conv_stem,
    torch.ops.lsmha_fast.seq_pool: _seq_pool,
}
