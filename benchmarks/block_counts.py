"""Launches of the inference form on a GPU, counted: `python -m benchmarks.block_counts`.

For cct_7_3x1_32 in 16 bits, per launch of a block: programs, bytes that programs read from the
second-level cache or memory (weights anew in each), bytes of all tensors once, operations, and the
least time that these take on an H200. Nothing is measured. A time is that of the slowest of four:

* tensors once over the memory's rate;
* reads of all programs over the cache's rate, taken as the 5120 bytes a clock of the A100;
* reads of one program times the rounds in which they run, 64 bytes a clock of a multiprocessor;
* operations of one program times the rounds, at the rate of wgmma from 64 rows on, else mma.sync.

A launch costs 1.5 us beside it: an estimate for one node of a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple
from unittest import mock

import torch

from benchmarks import limits

DEVICE = limits.DEVICES["H200"]
TOKENS, CHANNELS, HIDDEN, BLOCKS, HEADS, LABELS = 256, 256, 512, 7, 64, 100
LAUNCH = 1.5e-6
CACHE_BYTES_PER_CLOCK, SM_BYTES_PER_CLOCK = 5120, 64


class Launch(NamedTuple):
    """One launch: programs, and bytes read and operations of each; bytes of its tensors once."""

    name: str
    programs: int
    rows: int
    read: int
    flops: int
    once: int

    @property
    def seconds(self) -> float:
        """The least time by the rates above."""
        rounds = -(-self.programs // DEVICE.multiprocessors)
        dense = DEVICE.matrix / DEVICE.multiprocessors
        slow = DEVICE.tensor * DEVICE.mma_sync * DEVICE.clock
        return max(
            self.once / DEVICE.hbm,
            self.programs * self.read / (CACHE_BYTES_PER_CLOCK * DEVICE.clock),
            rounds * self.read / (SM_BYTES_PER_CLOCK * DEVICE.clock),
            rounds * self.flops / (dense if self.rows >= 64 else slow),
        )


def grids(batch: int) -> list[tuple[str, tuple, dict]]:
    """Kernel, grid and constants of what the launchers choose for this batch."""
    from triton.runtime.jit import JITFunction

    from lsmha_fast.ops.block import _triton

    found = []

    def run(kernel, *_, grid, warmup, **constants):
        found.append((kernel.__name__, grid, constants))

    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    rows, C = empty(batch * TOKENS, CHANNELS), CHANNELS
    weight, bias = empty(C, C), empty(C)
    pairs = weight, bias, bias, bias, empty(HIDDEN, C), empty(HIDDEN), empty(C, HIDDEN), bias
    with mock.patch.object(JITFunction, "run", run):
        _triton.norm_linear(rows, empty(3 * C, C), empty(3 * C), 1e-5)
        _triton.project_mlp(rows, rows, *pairs, True, 1e-5)
        tokens = rows.view(batch, TOKENS, C)
        _triton.norm_pool_linear(tokens, bias, empty(LABELS, C), empty(LABELS), 1e-5)
    return found


def launch(batch: int, name: str, grid: tuple, constants: dict) -> Launch:
    """What one launch reads and computes, in numbers of 2 bytes."""
    C, M = CHANNELS, batch * TOKENS
    rows = constants.get("BLOCK_M", 1)
    shares = grid[1] if len(grid) > 1 else 1
    if name == "_norm_linear":
        outputs = -(-3 * C // shares)
        read, inner, once = rows * C + outputs * C, outputs * C, 4 * M * C + 3 * C * C
    elif name == "_project_fc1":
        outputs = -(-HIDDEN // shares)
        inner = C * C + outputs * C
        read, once = 2 * rows * C + inner, 3 * M * C + M * HIDDEN + C * C + HIDDEN * C
    elif name == "_fc2":
        inner = HIDDEN * -(-C // shares)
        read, once = rows * (HIDDEN + C // shares) + inner, M * (HIDDEN + 2 * C) + HIDDEN * C
    elif name == "_project_mlp":
        inner = C * C + 2 * HIDDEN * C
        read, once = 3 * rows * C + inner, 3 * M * C + inner
    else:
        inner = 2 * TOKENS * C + LABELS * C
        read, once = TOKENS * C + LABELS * C, M * C + LABELS * C
    programs = grid[0] * shares
    return Launch(name, programs, rows, 2 * read, 2 * rows * inner, 2 * once)


def main() -> None:
    """Print a table per batch, and the sums of a model."""
    print(
        "| batch | launch | programs | read, MB | once, MB | GFLOP | least, us |\n"
        + "|---" * 7
        + "|"
    )
    sums = []
    for batch in (1, 8, 64, 512):
        *block, head = (launch(batch, *found) for found in grids(batch))
        for part in (*block, head):
            moved = part.programs * part.read / 1e6, part.once / 1e6
            work = part.programs * part.flops / 1e9
            cells = f"{moved[0]:.1f} | {moved[1]:.1f} | {work:.2f} | {1e6 * part.seconds:.1f}"
            print(f"| {batch} | `{part.name}` | {part.programs} | {cells} |")
        attention = limits.attention(DEVICE, batch, HEADS, TOKENS, CHANNELS // HEADS).seconds
        stem = limits.conv_stem(DEVICE, batch, CHANNELS, 32)["forward"]
        one = attention + sum(part.seconds for part in block)
        count = BLOCKS * (1 + len(block)) + 1 + 3
        total = BLOCKS * one + head.seconds + stem
        sums.append((batch, count, 1e6 * total, 1e6 * (total + count * LAUNCH)))
    print(
        "\n| batch | launches of the model | least, us | with 1.5 us per launch |\n"
        + "|---" * 4
        + "|"
    )
    for batch, count, least, all_in_all in sums:
        print(f"| {batch} | {count} | {least:.0f} | {all_in_all:.0f} |")


if __name__ == "__main__":
    main()
