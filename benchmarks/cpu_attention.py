"""Attention on a CPU against PyTorch's kernel, as one table: `python -m benchmarks.cpu_attention`.

B = 8, N = 256, H x D = 256, two threads, contiguous q, k, v: how many times as long as ours
`scaled_dot_product_attention` takes, by medians of both measured in turns in one process.
ATEN_CPU_CAPABILITY=avx2 (or default) holds both to AVX2 (or to no vector extension at all): it is
PyTorch's own switch, read once per process. --all runs the three in processes of their own. With
--threads 1 times are those of the processor, which other programs do not change.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from benchmarks.interleaved import medians
from lsmha_fast.ops import attention

CHANNELS = 256
CAPABILITIES = ("avx512", "avx2", "default")


def ratios(B: int, N: int, D: int, dtype: torch.dtype, rounds: int) -> list[float]:
    """SDPA's time over ours: forward, and forward with autograd's backward."""
    timer = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    q, k, v, do = (torch.randn(B, CHANNELS // D, N, D).to(dtype) for _ in range(4))
    found = []
    for backward in (False, True):

        def call(function, backward=backward):
            if not backward:
                with torch.no_grad():
                    return function(q, k, v)
            inputs = [t.detach().requires_grad_() for t in (q, k, v)]
            return torch.autograd.grad(function(*inputs), inputs, do)

        seconds = medians(
            {
                "ours": lambda call=call: call(attention),
                "sdpa": lambda call=call: call(F.scaled_dot_product_attention),
            },
            rounds,
            timer,
        )
        found.append(seconds["sdpa"] / seconds["ours"])
    return found


def main() -> None:
    """Print the table of this process's instruction set, or with --all of every one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--all", action="store_true", help="AVX-512, AVX2 and neither")
    options = parser.parse_args()
    if options.all:
        arguments = [a for a in sys.argv[1:] if a != "--all"]
        for name in CAPABILITIES:
            command = [sys.executable, "-m", "benchmarks.cpu_attention", *arguments]
            subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": name}, check=True)
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}: SDPA / ours")
    print("| D | forward | forward + backward |\n|---|---|---|")
    for D in (1, 2, 4, 8, 16, 32, 64):
        dtype = getattr(torch, options.dtype)
        forward, both = ratios(options.batch, options.tokens, D, dtype, options.rounds)
        print(f"| {D} | {forward:.2f} | {both:.2f} |", flush=True)


if __name__ == "__main__":
    main()
