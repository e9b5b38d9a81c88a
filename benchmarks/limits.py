"""What a Hopper GPU allows: least times from counted work over the rates of its units.

A limit is no estimate of a kernel: it is the time that the slowest unit needs for the least work,
were everything else free. Work is counted in weights of a warp: 32 attention weights, one in each
lane. A multiprocessor has four schedulers, each of which issues one warp instruction per clock.
"""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """Rates of a GPU; per clock they are those of one multiprocessor.

    `hbm` and `matrix` are read from a copy and an 8192^3 product, bytes and bf16 operations per
    second; `mufu` exponentials per clock; `tensor` dense bf16 operations per clock, of which
    mma.sync reaches `mma_sync` (arXiv 2402.13499, arXiv 2501.12084).
    """

    multiprocessors: int
    clock: float
    hbm: float
    matrix: float
    mufu: int = 16
    tensor: int = 4096
    mma_sync: float = 0.63

    @property
    def schedulers(self) -> float:
        """Warp instructions per second of the whole device."""
        return self.multiprocessors * 4 * self.clock

    @property
    def mufu_clocks(self) -> float:
        """Clocks of a scheduler for the exponentials of one warp."""
        return 4 * 32 / self.mufu

    def product_clocks(self, flops: float) -> float:
        """Clocks of a scheduler for `flops` per lane by mma.sync."""
        return flops * 32 / (self.tensor / 4 * self.mma_sync)


DEVICES = {
    "H100": Device(132, 1.755e9, 3.0e12, 700e12),
    "H200": Device(132, 1.980e9, 4.3e12, 790e12),
}

# instructions per weight that no arrangement was found to avoid, and those that an exponential by
# polynomial adds; counted in the machine code of 16-bit prototypes (keys and values in registers,
# row bound as the product's third operand, row sum from a column of ones), by head dim
FORWARD_SLOTS = {8: 2.50, 16: 2.48, 32: 3.4}
BACKWARD_SLOTS = {5: 4.62, 8: 5.61, 16: 6.32, 32: 7.5}
POLYNOMIAL_SLOTS = {"forward": 6.5, "backward": 7.0}
DROPOUT_SLOTS = 2.7


class Limit(NamedTuple):
    """Least seconds of one call, by unit; `balanced` moves exponentials to where there is room."""

    memory: float
    products: float
    exponentials: float
    issue: float
    balanced: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.balanced)


def attention(
    device: Device, B: int, H: int, N: int, D: int, *, backward=False, dropout=False
) -> Limit:
    """Limit of 16-bit self-attention: the forward pass, or the backward pass alone."""
    warps = B * H * N * N / 32
    heads = B * N * H * D * 2
    memory = heads * (8 if backward else 4) + 4 * B * H * N * (2 if backward else 1)
    inner = 8 if D <= 8 else _up(D, 16)
    columns = _up(D, 8)
    sums = 0 if columns > D else 8  # the row sum needs a column of its own
    flops = 4 * inner + 6 * columns if backward else 2 * inner + 2 * (columns + sums)
    slots = _of(BACKWARD_SLOTS if backward else FORWARD_SLOTS, D) + DROPOUT_SLOTS * dropout
    extra = POLYNOMIAL_SLOTS["backward" if backward else "forward"]
    products = device.product_clocks(flops)
    if D >= 32:  # where wgmma is worth its larger tiles
        products = min(products, flops * 32 * device.schedulers / device.matrix)
    mufu = device.mufu_clocks
    share = min(max((mufu - slots) / (mufu + extra), 0), 0.75)  # both units equally busy
    balanced = max(mufu * (1 - share), slots + extra * share, products)
    clocks = (products, mufu, slots, balanced)
    return Limit(memory / device.hbm, *(c * warps / device.schedulers for c in clocks))


def conv_stem(device: Device, B: int, C: int, pixels: int, CIN: int = 3) -> dict[str, float]:
    """Least seconds of a 16-bit first layer (3x3, stride 1, CCT's pool), forward and backward.

    The backward pass is that of the weight and the bias. A sum of the convolution takes at least 7
    instructions on the way to its maximum and 8 on the way back (select among 4 windows).
    """
    sums = B * pixels**2 * C
    tokens = B * ((pixels + 1) // 2) ** 2 * C
    memory = (B * CIN * pixels**2 * 2 + tokens * 3) / device.hbm
    products = device.product_clocks(2 * _up(9 * CIN, 16)) * sums / 32 / device.schedulers
    issue = {"forward": 7, "backward": 8}
    return {k: max(memory, products, sums / 32 * n / device.schedulers) for k, n in issue.items()}


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _of(table: dict[int, float], D: int) -> float:
    return next((value for width, value in table.items() if width >= D), max(table.values()))
