"""Build and run pipes.cu: rates of the units that the attention kernels keep busy.

    python benchmarks/micro/run.py [OUT.json]

Prints instructions of one scheduler per clock, for mixtures of instructions. Needs nvcc and a GPU;
says what is missing and does nothing where there is none.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "csrc/cuda"))

import cuda_toolkit  # noqa: E402


def main() -> None:
    lack = cuda_toolkit.missing() or (None if torch.cuda.is_available() else "no CUDA device")
    if lack:
        print(f"not measured: {lack}")
        return
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' if major == 9 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "pipes")
        nvcc = cuda_toolkit.nvcc(cuda_toolkit.find())
        target = f"arch=compute_{arch},code=sm_{arch}"
        source = HERE / "pipes.cu"
        subprocess.run(
            [nvcc, "-std=c++17", "-O3", "-gencode", target, "-o", binary, source], check=True
        )
        done = subprocess.run([binary], check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    print(f"{torch.cuda.get_device_name()}, instructions per clock and scheduler")
    print(f"{'1 warp':>8} {'4 warps':>8} {'8 warps':>8}  mixture")
    for row in rows:
        rates = (row[f"per_clock_{warps}_warps"] for warps in (1, 4, 8))
        print(*(f"{rate:8.3f}" for rate in rates), "", row["mix"])
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
