"""`torch.vmap` of the attention ops: the mapped dimension joins the batch where that is exact."""

from __future__ import annotations

import torch
from torch import Tensor


def register(name: str) -> None:
    """Give an op of the package, as `attention`, a rule for `torch.vmap`."""
    op = getattr(torch.ops.lsmha_fast, name)
    for overload in (op.default, op.cpp):
        torch.library.register_vmap(overload, _rule(overload))


def _rule(op):
    names = [argument.name for argument in op._schema.arguments]

    def rule(info, in_dims, *args):
        size = info.batch_size
        is_mapped = [d is not None for d in in_dims]
        args = [
            a.movedim(d, 0) if m else a for a, d, m in zip(args, in_dims, is_mapped, strict=True)
        ]
        if _may_join(dict(zip(names, args, strict=True)), dict(zip(names, is_mapped, strict=True))):
            joined = [
                _join(a, m, size) if isinstance(a, Tensor) and name != "bias" else a
                for name, a, m in zip(names, args, is_mapped, strict=True)
            ]
            outs = tuple(_split(out, size) for out in op(*joined))
        else:
            samples = [
                op(*(a[i] if m else a for a, m in zip(args, is_mapped, strict=True)))
                for i in range(size)
            ]
            outs = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
        return outs, (0,) * len(outs)

    return rule


def _may_join(args: dict, is_mapped: dict) -> bool:
    """Whether samples may share one call.

    Not with dropout, whose bits depend on the place in the batch; nor where a gradient is a sum
    over the batch; nor with a bias of their own.
    """
    bias = args["bias"]
    own_bias = bias is not None and (is_mapped["bias"] or bias.shape[0] != 1)
    sums = args.get("bias_grad") or args.get("head_scale") is not None
    return args.get("seed") is None and not own_bias and not sums


def _join(a: Tensor, is_mapped: bool, size: int) -> Tensor:
    """(V, B, ...) or (B, ...) -> (V B, ...)."""
    return (a if is_mapped else a.expand(size, *a.shape)).flatten(0, 1)


def _split(out: Tensor, size: int) -> Tensor:
    """(V B, ...) -> (V, B, ...); a gradient nobody asked for is empty for every sample."""
    if out.ndim == 1:
        return out.expand(size, *out.shape)
    return out.unflatten(0, (size, len(out) // size))
