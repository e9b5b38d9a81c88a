"""A CCT with fewer heads or hidden nodes: a smaller model, not a masked one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ..nn import EncoderBlock, prune_heads, prune_hidden
from .cct import CCT

Kept = Sequence[Sequence[int] | None]


def prune_model(model: CCT, *, heads: Kept | None = None, hidden: Kept | None = None) -> CCT:
    """A copy of a CCT without the other heads and hidden nodes.

    `create_model` makes the same model from `num_heads`, `head_dim` and `mlp_hidden` as lists,
    so it is saved and loaded as any other.

    Args:
        model: left as it is.
        heads: per transformer block the numbers of the heads to keep, from 0; None keeps all. A
            block keeps at least one, since without any it would be another architecture.
        hidden: likewise of the MLP's hidden nodes.

    Returns:
        The copy.

    Raises:
        ValueError: not one entry per transformer block, or numbers that do not fit.
    """
    pruned = copy.deepcopy(model)
    blocks = [block for block in pruned.blocks if isinstance(block, EncoderBlock)]
    for what, kept in (("heads", heads), ("hidden", hidden)):
        if kept is not None and len(kept) != len(blocks):
            raise ValueError(f"{what}: {len(kept)} entries for {len(blocks)} transformer blocks")
    everything = [None] * len(blocks)
    for block, some, nodes in zip(blocks, heads or everything, hidden or everything, strict=True):
        if some is not None:
            block.self_attn = prune_heads(block.self_attn, some)
        if nodes is not None:
            block.linear1, block.linear2 = prune_hidden(block, nodes)
    return pruned


def drop_silent(model: CCT) -> CCT:
    """A copy of a CCT without the heads and hidden nodes whose outgoing weights are all zero.

    What they computed went nowhere, so the logits are the same. A block keeps at least one head
    and one hidden node, the first, where all are silent.

    Args:
        model: left as it is.

    Returns:
        The copy.
    """
    heads, hidden = [], []
    for block in model.blocks:
        if isinstance(block, EncoderBlock):
            attn = block.self_attn
            weight = attn.out_proj.weight.unflatten(1, (attn.num_heads, attn.head_dim))
            heads.append(_speaking(weight.ne(0).any(2).any(0)))
            hidden.append(_speaking(block.linear2.weight.ne(0).any(0)))
    return prune_model(model, heads=heads, hidden=hidden)


def _speaking(speaks: Tensor) -> list[int]:
    return torch.where(speaks)[0].tolist() or [0]
