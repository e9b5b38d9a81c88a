"""Many calls of a Runner with the memory of the process after each tenth of them.

python -m benchmarks.soak [CALLS]

Prints one line per tenth; exit code 1 where the memory grew by more than 8 bytes per call (the
smallest tensor takes 64).
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import torch

from lsmha_fast import create_model
from lsmha_fast.deploy import Runner, optimize

MAX_BATCH = 8


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main(calls: int) -> int:
    """Call a small model with batches of 1 to 8 images of bytes."""
    images = torch.randint(256, (MAX_BATCH, 3, 16, 16), dtype=torch.uint8)
    model = create_model("cct_2_3x2_16", 10, num_heads=16, dim=32)
    runner = Runner(optimize(model, images, mean=(0.5,) * 3, std=(0.5,) * 3), MAX_BATCH)
    for i in range(1000):
        runner(images[: 1 + i % MAX_BATCH])
    first = resident_bytes()
    print(f"after 1000 calls: {first / 2**20:.1f} MiB", flush=True)
    start = time.perf_counter()
    for i in range(calls):
        runner(images[: 1 + i % MAX_BATCH])
        if (i + 1) % max(calls // 10, 1) == 0:
            seconds = time.perf_counter() - start
            print(f"{i + 1} calls, {seconds:.0f} s: {resident_bytes() / 2**20:.1f} MiB", flush=True)
    grown = resident_bytes() - first
    print(f"grown by {grown / 2**10:.0f} KiB")
    return int(grown > 8 * calls)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
