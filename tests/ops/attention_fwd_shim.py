"""The CUDA forward kernel run by the shim of tests/cuda, called like a backend."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lsmha_fast.ops.attention.common import Inputs, dropout_rule

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
import shim


def forward(a: Inputs, *, keys: int = 1 << 20, multiprocessors: int = 1):
    """`lsmha_fast.ops.attention._cuda.attention`, with the plan's keys in shared memory and size
    of the device given. Memory that the kernel does not write stays NaN."""
    B, H, L, D = a.q.shape
    o = torch.full((B, L, H, D), torch.nan, dtype=a.q.dtype).transpose(1, 2)
    lse = torch.full((B, H, L), torch.nan)
    threshold, factor = dropout_rule(a.dropout_p) if a.seed is not None else (0, 1.0)
    arguments = {"q": a.q, "k": a.k, "v": a.v, "o": o, "lse": lse}
    if a.key_mask is not None:
        arguments["key_mask"] = a.key_mask
    if a.head_scale is not None:
        arguments["head_scale"] = a.head_scale.float()
    if a.seed is not None:
        arguments["seed"] = a.seed
    shim.run(
        harness(), **arguments, threshold=min(threshold, 65535), keep_factor=factor,
        scale=a.scale, keys=keys, multiprocessors=multiprocessors,
    )  # fmt: skip
    return o, lse


def harness() -> Path:
    return shim.build(Path(__file__).with_name("attention_fwd_harness.cpp"))
