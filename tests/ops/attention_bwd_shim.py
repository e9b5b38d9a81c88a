"""The CUDA backward kernel run by the shim of tests/cuda, called like a backend."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lsmha_fast.ops.attention.common import Inputs, dropout_rule

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
import shim


def backward(do, a: Inputs, o, lse, buffers, *, queries: int = 1 << 20, multiprocessors: int = 1):
    """Fill `buffers` (dq, dk, dv) and return dhead_scale (H,) or None, with the plan's queries of a
    warp and size of the device given. Memory that the kernel does not write stays as it is."""
    threshold, factor = dropout_rule(a.dropout_p) if a.seed is not None else (0, 1.0)
    arguments = {"q": a.q, "k": a.k, "v": a.v, "o": o, "grad_o": do, "lse": lse}
    arguments |= dict(zip(("grad_q", "grad_k", "grad_v"), buffers, strict=True))
    share = None
    if a.key_mask is not None:
        arguments["key_mask"] = a.key_mask
    if a.head_scale is not None:
        share = torch.full(a.q.shape[:2], torch.nan)
        arguments |= {"head_scale": a.head_scale.float(), "grad_head_scale": share}
    if a.seed is not None:
        arguments["seed"] = a.seed
    shim.run(
        harness(), **arguments, threshold=min(threshold, 65535), keep_factor=factor,
        scale=a.scale, queries=queries, multiprocessors=multiprocessors,
    )  # fmt: skip
    return None if share is None else share.sum(0).to(a.head_scale.dtype)


def harness() -> Path:
    return shim.build(Path(__file__).with_name("attention_bwd_harness.cpp"))
