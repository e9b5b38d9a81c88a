"""Fewer heads and fewer hidden nodes: modules whose removed parts are gone, not masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from .attention import LSMultiHeadAttention
from .blocks import EncoderBlock
from .linear import Linear

M = TypeVar("M", bound=nn.Module)


def prune_heads(module: LSMultiHeadAttention, kept: Sequence[int]) -> LSMultiHeadAttention:
    """A new module of some of the heads: their rows of q, k and v, their columns of `out_proj`.

    It computes what `module` computes with `head_scale` 0 for the other heads and 1 for these.
    The heads keep their number of channels, so the module is narrower and faster.

    Args:
        module: left as it is; any of its options.
        kept: numbers of the heads to keep, from 0, at least one, each once; kept in this order.

    Returns:
        The new module, on the same device, in the same mode.

    Raises:
        ValueError: no head, a head twice, or one that is not there.
    """
    heads = _checked(kept, module.num_heads, "head")
    D = module.head_dim
    rows = (torch.tensor(heads)[:, None] * D + torch.arange(D)).flatten()
    made = {"device": module.out_proj.weight.device, "dtype": module.out_proj.weight.dtype}
    pruned = LSMultiHeadAttention(
        module.embed_dim,
        len(heads),
        module.dropout,
        module.out_proj.bias is not None,
        module.bias_k is not None,
        module.add_zero_attn,
        module.kdim,
        module.vdim,
        module.batch_first,
        head_dim=D,
        qkv_bias=module.in_proj_bias is not None,
        backend=module.backend,
        **made,
    )
    inner = module.num_heads * D
    three = (torch.arange(3)[:, None] * inner + rows).flatten()  # rows of q, of k and of v
    where = {
        "in_proj_weight": (0, three),
        "in_proj_bias": (0, three),
        **dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), (0, rows)),
        **dict.fromkeys(("bias_k", "bias_v"), (2, rows)),
        "out_proj.weight": (1, rows),
        "out_proj.bias": None,
    }
    return _take(module, pruned, where)


def prune_hidden(block: EncoderBlock, kept: Sequence[int]) -> tuple[Linear, Linear]:
    """New `linear1` and `linear2` of some of a block's hidden nodes.

    Args:
        block: left as it is.
        kept: numbers of the nodes to keep, from 0, at least one, each once.

    Returns:
        (`linear1`, `linear2`).

    Raises:
        ValueError: no node, a node twice, or one that is not there.
    """
    first, second = block.linear1, block.linear2
    nodes = torch.tensor(_checked(kept, first.out_features, "hidden node"))
    made = {"device": first.weight.device, "dtype": first.weight.dtype}
    narrow = Linear(first.in_features, len(nodes), first.bias is not None, **made)
    wide = Linear(len(nodes), second.out_features, second.bias is not None, **made)
    return (
        _take(first, narrow, {"weight": (0, nodes), "bias": (0, nodes)}),
        _take(second, wide, {"weight": (1, nodes), "bias": None}),
    )


def _checked(kept: Sequence[int], count: int, what: str) -> list[int]:
    numbers = [int(n) for n in kept]
    if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(count)):
        raise ValueError(
            f"keep at least one {what}, each once, of the numbers 0..{count - 1}; got {numbers}"
        )
    return numbers


@torch.no_grad()
def _take(source: M, target: M, where: Mapping[str, tuple[int, Tensor] | None]) -> M:
    """Fill `target` with slices of `source`: of each parameter (dimension, indices) or all."""
    for name, parameter in target.named_parameters():
        full, part = source.get_parameter(name), where[name]
        taken = full if part is None else full.index_select(part[0], part[1].to(full.device))
        parameter.copy_(taken)
        parameter.requires_grad_(full.requires_grad)
    return target.train(source.training)
