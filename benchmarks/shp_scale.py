"""Peak memory and time of SHP at ImageNet's scale, on synthetic features, against a stated bound.

python -m benchmarks.shp_scale                       # 1000 labels, 12 blocks of 256 heads
python -m benchmarks.shp_scale --classes 100 --heads 64 --depth 2

Features are made batch by batch from a table of planted labels; every head recognises about 4.
The command starts itself again with MALLOC_MMAP_THRESHOLD_=1048576: glibc keeps freed blocks of
some MiB, aligned as torch wants them, and does not reuse them: its heap grows without end.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lsmha_fast.analysis import BlockProbe, Probes, single_head_performance, stream_block

# of allocator and threads, whatever the sizes
SLACK = 64 << 20


def bound(a: argparse.Namespace) -> int:
    """Bytes above what the process has taken once its libraries are loaded and inputs made.

    Sums in fp64 (those of the batch's group, their copy, and the total before and after adding),
    the factors in fp32 (twice) and in fp64 of one block, the heads of one batch of all blocks
    twice, one chunk of matrices, and four (K, K) matrices in fp64.
    """
    C = a.heads * a.head_dim
    factors = a.depth * a.classes * C * (4 * 8 + 2 * 4) + 3 * 8 * a.classes * C
    batch = 2 * 4 * a.depth * a.batch * a.tokens * C
    return factors + batch + (a.chunk_mib << 20) + 4 * 8 * a.classes**2 + SLACK


class Synthetic(nn.Module):
    """`images` are (B, N, C) noise whose first element is the label: heads carry it in some."""

    def __init__(self, a: argparse.Namespace):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shape = (a.classes, a.heads, a.head_dim)
        self.tables = []
        for _ in range(a.depth):
            planted = torch.rand(a.classes, a.heads, 1, generator=generator) < 4 / a.classes
            noise = 0.05 * torch.randn(shape, generator=generator)
            self.tables.append(planted * torch.randn(shape, generator=generator).sign() + noise)
        self.classes, self.head = a.classes, shape[1:]

    def forward_with_heads(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        labels = images[:, 0, 0].long()
        logits = nn.functional.one_hot(labels, self.classes).float()
        noise = images.unflatten(2, self.head)
        return logits, [0.1 * noise + table[labels][:, None] for table in self.tables]


class Images:
    """Every label as often, in batches that are made when they are asked for."""

    def __init__(self, a: argparse.Namespace):
        self.a = a

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        a = self.a
        generator = torch.Generator().manual_seed(1)
        for labels in (torch.arange(a.images * a.classes) % a.classes).split(a.batch):
            images = torch.randn(len(labels), a.tokens, a.heads * a.head_dim, generator=generator)
            images[:, 0, 0] = labels.float()
            yield images, labels


def peak_rss() -> int:
    """Bytes of this process at its largest so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(a: argparse.Namespace) -> tuple[int, tuple[float, float]]:
    """Peak memory before measuring, with inputs made, and seconds of sums and of clusters."""
    model, shape = Synthetic(a), (a.heads, a.head_dim)
    blocks = tuple(BlockProbe(torch.zeros(shape), t, torch.zeros(a.classes)) for t in model.tables)
    probes = Probes(blocks, tuple(f"block {m + 1}" for m in range(a.depth)))
    before, start = peak_rss(), time.perf_counter()
    shp = single_head_performance(model, probes, Images(a))
    middle = time.perf_counter()
    for m in range(a.depth):
        found = stream_block(shp, m, chunk_bytes=a.chunk_mib << 20)
        clusters = found.number.double().mean()
        print(f"block {m + 1}: {clusters:.2f} clusters per head, SNR {found.snr.mean_snr:.1f}")
    return before, (middle - start, time.perf_counter() - middle)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and exit with 1 where the bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    defaults = {"classes": 1000, "heads": 256, "head_dim": 4, "depth": 12, "tokens": 196}
    defaults |= {"images": 2, "batch": 8, "chunk_mib": 256}
    for name, value in defaults.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    a = parser.parse_args(argv)
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "1048576"
        options = sys.argv[1:] if argv is None else argv
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.shp_scale", *options])
    # libraries that load on first use are not part of what is measured
    measure(argparse.Namespace(**defaults | {"classes": 2, "heads": 2, "depth": 1, "tokens": 1}))
    before, seconds = measure(a)
    used, allowed = peak_rss() - before, bound(a)
    print(
        f"{a.classes} labels, {a.depth} blocks of {a.heads} heads of {a.head_dim}: "
        f"sums {seconds[0]:.1f} s, clusters {seconds[1]:.1f} s"
    )
    whole = 4 * a.depth * a.heads * a.classes**2
    print(
        f"peak {used / 2**20:.0f} MiB above the {before / 2**20:.0f} MiB before, bound "
        f"{allowed / 2**20:.0f} MiB; the matrices alone would take {whole / 2**20:.0f} MiB"
    )
    return int(used > allowed)


if __name__ == "__main__":
    raise SystemExit(main())
