"""Clock cycles of attention's CPU kernels per 16 weights: `python -m benchmarks.cpu_cycles`.

Compiles csrc/cpu/attention_kernels.cpp with benchmarks/cpu_cycles.cpp, runs one head of 256 tokens
on one core and prints a table: the kernels alone, without PyTorch and without memory traffic. The
clock is measured, not read. ATEN_CPU_CAPABILITY=avx2 or default chooses the narrower kernels.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run() -> tuple[float, list[list[float]]]:
    """The clock in GHz, and rows of D and cycles: forward, with dropout, backward, random bits."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "cycles")
        sources = [ROOT / "benchmarks/cpu_cycles.cpp", ROOT / "csrc/cpu/attention_kernels.cpp"]
        flags = ["-std=c++17", "-O3", "-Wno-psabi", "-I", ROOT / "csrc/cpu"]
        subprocess.run([*compiler, *flags, "-o", program, *sources], check=True)
        done = subprocess.run([program], capture_output=True, text=True, check=True)
    clock, *rows = done.stdout.splitlines()
    return float(clock), [[float(x) for x in row.split()] for row in rows]


def processor() -> str:
    """What the system calls the processor, with its family and model."""
    text = Path("/proc/cpuinfo").read_text()
    found = [re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
             for key in ("model name", "cpu family", "model")]  # fmt: skip
    return ", ".join(f"{m[0].split(':')[0].strip()} {m[1]}" for m in found if m)


def main() -> None:
    """Print the table."""
    clock, rows = run()
    wish = os.environ.get("ATEN_CPU_CAPABILITY", "the widest vectors")
    print(f"{processor()}, {clock:.2f} GHz, {wish}: cycles per 16 weights")
    print("| D | forward | with dropout | backward | random bits |\n|---|---|---|---|---|")
    for D, *cycles in rows:
        print(f"| {D:.0f} | " + " | ".join(f"{c:.1f}" for c in cycles) + " |")


if __name__ == "__main__":
    main()
