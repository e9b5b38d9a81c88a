"""What `replace_attention` did, and what it left alone."""

from __future__ import annotations

from typing import NamedTuple


class Swap(NamedTuple):
    """One module that now computes its attention with `lsmha_fast.ops`."""

    name: str  # path in the model, "" for the model itself
    origin: str  # its class, with the module it comes from
    num_heads: int
    head_dim: int  # channels of a query


class Skip(NamedTuple):
    """One module that looks like attention and was left as it is."""

    name: str
    origin: str
    reason: str


class Account(list[Swap]):
    """The list of swaps, in the model's order; `skipped` holds what was not swapped."""

    def __init__(self, swaps=(), skipped=()):
        super().__init__(swaps)
        self.skipped: list[Skip] = list(skipped)

    def __str__(self) -> str:
        lines = [f"{len(self)} attention modules swapped, {len(self.skipped)} left as they are"]
        lines += [f"  {s.name or '.'}: {s.origin}, {s.num_heads} x {s.head_dim}" for s in self]
        lines += [f"  {s.name or '.'}: {s.origin}, left: {s.reason}" for s in self.skipped]
        return "\n".join(lines)
