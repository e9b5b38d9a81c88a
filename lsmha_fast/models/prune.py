"""A CCT with fewer heads or hidden nodes: a smaller model, not a masked one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

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
