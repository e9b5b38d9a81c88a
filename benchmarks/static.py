"""What the compilers make of every GPU kernel, and how long that must take: no GPU needed.

python -m benchmarks.static            # compile, count, print the tables
python -m benchmarks.static --write    # and keep them in benchmarks/static.json, docs/static.md

For each CUDA kernel on sm_90a: registers, shared memory, spills, resident warps, instructions per
attention weight (or per sum of the convolution), the time that the busiest unit of an H200 needs
for them on the training shapes below, and the limit of `benchmarks/limits.py`. The time is counted,
not measured. For each Triton kernel on sm_90: registers, shared memory, spills.

The instructions are those of the innermost loop, with what lies behind branches that a training
shape does not take: a backward kernel's true number lies between that of its tiles alone
(tests/ops/test_attention_cuda_bwd.py) and this one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks import limits

ROOT = Path(__file__).resolve().parents[1]
# the readers of machine code and the C++ shim belong to the tests
sys.path[:0] = [str(ROOT / part) for part in ("csrc/cuda", "tests/cuda", "tests")]

JSON = ROOT / "benchmarks/static.json"
PAGE = ROOT / "docs/static.md"
ARCHITECTURE = "sm_90a"
DEVICE = limits.DEVICES["H200"]
# the training shapes: images, tokens, channels of attention; images, channels, pixels of the stem
ATTENTION = {"B": 256, "N": 256, "C": 256}
STEM = {"B": 1024, "C": 256, "pixels": 32}
SOURCES = (
    "csrc/cuda/attention_fwd.cu",
    "csrc/cuda/attention_bwd.cu",
    "tests/ops/conv_stem_kernels.cu",
)
TRITON = (
    "tests.ops.attention_launches",
    "tests.ops.block_launches",
    "tests.ops.conv_stem_launches",
    "lsmha_fast.ops.seq_pool._triton",
    "lsmha_fast.ops.head_class_sums._triton",
    "lsmha_fast.ops.residual_norm._triton",
)
TYPES = {"float": "fp32", "dev::Bf16": "bf16", "dev::Fp16": "fp16"}
# a multiprocessor of sm_90; a block takes 1 KB of shared memory beside its own
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 228 << 10, 64, 32
# what may get worse before a test complains: registers; share of the instructions
SLACK_REGISTERS, SLACK_SLOTS = 8, 0.03


def cuda_rows() -> list[dict]:
    """One row per CUDA kernel."""
    import sass

    plans = launch_plans()
    rows = []
    for source in SOURCES:
        for name, kernel in sass.compile_kernels(ROOT / source, ARCHITECTURE).items():
            key, emulated = identify(name)
            rows.append(_row(key, kernel, emulated, plans[key]))
    return sorted(rows, key=lambda r: (r["kernel"], r["dtype"], r["head_dim"], r["dropout"]))


def launch_plans() -> dict[tuple, dict]:
    """How `launch_plans.cpp` lays the training shapes over the device, by kernel."""
    import shim

    binary = shim.build(Path(__file__).with_name("launch_plans.cpp"))
    sizes = (DEVICE.multiprocessors, *ATTENTION.values(), STEM["B"])
    command = [str(binary), *map(str, sizes)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    plans = [json.loads(line) for line in text.splitlines()]
    return {(p["kernel"], p["dtype"], p["head_dim"], p["dropout"]): p for p in plans}


def identify(name: str) -> tuple[tuple, int]:
    """(kernel, dtype, head dim, dropout) of a demangled name, and its exponentials of 8 by
    polynomial; the head dim of the conv stem is 0."""
    kernel = re.search(r"(\w+)<", name).group(1)
    dtype = next((short for long, short in TYPES.items() if long in name), "fp32")
    plain = name.replace("(bool)0", "false").replace("(bool)1", "true").replace("(int)", "")
    if kernel.startswith("conv_stem"):
        codes = ", codes" * (kernel == "conv_stem_forward" and "true>" in plain)
        return (kernel + codes, dtype, 0, False), 0
    width, dropout, emulated = re.search(r"(\d+), (true|false)(?:, (\d))?\s*>", plain).groups()
    return (kernel, dtype, int(width), dropout == "true"), int(emulated or 0)


def _row(key, kernel, emulated, plan) -> dict:
    """Counts of one kernel and the time they take; `work` is weights, or sums of the stem."""
    name, dtype, D, _ = key
    loops = [loop for loop in kernel.loops if loop.count("MUFU.EX2" if D else "HMMA")]
    # the forward kernels have a second loop for heads whose row bound is not safe
    loop = min(loops, key=lambda loop: loop.slots)
    exponentials = loop.count("MUFU.EX2")
    work = exponentials / (1 - emulated / 8) if D else {"fwd": 64, "dwe": 32}[_pass(name)]
    slots, mufu = loop.slots / work, exponentials / work
    products = product_clocks(loop.opcodes) / work
    blocks = resident_blocks(kernel.registers, plan["shared"], plan["threads"])
    limit, memory, total = _limit(key)
    busiest = max(slots, mufu * DEVICE.mufu_clocks, products)
    return {
        **{k: plan[k] for k in ("kernel", "dtype", "head_dim", "dropout", "shared")},
        "registers": kernel.registers,
        "spills": kernel.spills,
        "warps": blocks * plan["threads"] // 32,
        "slots": round(slots, 2),
        "mufu": round(mufu, 2),
        "product_clocks": round(products, 2),
        "counted_us": round(1e6 * max(memory, busiest * total / 32 / DEVICE.schedulers), 1),
        "limit_us": None if limit is None else round(1e6 * limit, 1),
    }


def _pass(name: str) -> str:
    return "fwd" if "forward" in name else "dwe"


def product_clocks(opcodes: Counter) -> float:
    """Clocks of a scheduler's tensor core for the products among these instructions."""
    clocks = 0.0
    for opcode, count in opcodes.items():
        if shape := re.match(r"HMMA\.168(\d+)", opcode):
            flops = 2 * 16 * 8 * int(shape.group(1)) * (2 if "TF32" in opcode else 1)
            clocks += count * DEVICE.product_clocks(flops / 32)
    return clocks


def resident_blocks(registers: int, shared: int, threads: int) -> int:
    """Blocks that fit a multiprocessor at once."""
    warps = threads // 32
    of_registers = REGISTERS // (-(-registers // 8) * 8 * 32) // warps
    return min(of_registers, SHARED // (shared + 1024), WARPS // warps, BLOCKS)


def _limit(key) -> tuple[float | None, float, int]:
    """Least seconds of a kernel's call (16 bits only), those of its memory, and its work."""
    name, dtype, D, dropout = key
    if D == 0:
        B, C, pixels = STEM.values()
        least = limits.conv_stem(DEVICE, **STEM)["forward" if "forward" in name else "backward"]
        memory = B * (3 * pixels**2 * 2 + (pixels // 2) ** 2 * C * 3) / DEVICE.hbm
        return least, memory, B * C * pixels**2
    B, N, C = ATTENTION.values()
    shape, backward = (B, C // D, N, D), name == "attention_backward"
    limit = limits.attention(DEVICE, *shape, backward=backward, dropout=dropout)
    wide = dtype == "fp32"
    return None if wide else limit.seconds, limit.memory * (1 + wide), B * (C // D) * N * N


def triton_rows() -> list[dict]:
    """One row per Triton kernel that the launchers choose for the tested shapes."""
    from aot import compile_configs

    return merged([config for module in TRITON for config in compile_configs(module)])


def merged(configs: list[dict]) -> list[dict]:
    """Rows with distinct names; of configurations that differ only in alignment, the largest."""
    rows: dict[str, dict] = {}
    for config in configs:
        row = rows.setdefault(config["name"], {"name": config["name"]})
        row.update({k: max(config[k], row.get(k, 0)) for k in TRITON_COLUMNS})
    return list(rows.values())


def versions() -> dict:
    """The compilers that made the code."""
    import cuda_toolkit
    import triton

    return {"nvcc": cuda_toolkit.version(cuda_toolkit.find()), "triton": triton.__version__}


def worse(now: list[dict], kept: list[dict]) -> list[str]:
    """What got worse than the kept table, or is missing in it, one line each.

    Args:
        now: rows of `cuda_rows()` or `triton_rows()`.
        kept: the rows of that kind in `static.json`.
    """
    lines = []
    known = {_name(row): row for row in kept}
    for row in now:
        name, old = _name(row), known.get(_name(row))
        if old is None:
            lines.append(f"{name}: not in the table")
            continue
        for key, slack in (("registers", SLACK_REGISTERS), ("n_regs", SLACK_REGISTERS)):
            if row.get(key, 0) > old.get(key, 0) + slack:
                lines.append(f"{name}: {row[key]} registers, were {old[key]}")
        for key in ("spills", "n_spills"):
            if row.get(key, 0) > old.get(key, 0):
                lines.append(f"{name}: spills {row[key]} bytes, were {old[key]}")
        if row.get("slots", 0) > old.get("slots", 0) * (1 + SLACK_SLOTS):
            lines.append(f"{name}: {row['slots']} instructions, were {old['slots']}")
    return lines


def _name(row: dict) -> str:
    if "name" in row:
        return row["name"]
    dropout = ", dropout" * row["dropout"]
    width = f", D <= {row['head_dim']}" * (row["head_dim"] > 0)
    return f"{row['kernel']}[{row['dtype']}{width}{dropout}]"


def kept() -> dict:
    """What `--write` kept last: `versions`, and rows under `cuda` and `triton`."""
    return json.loads(JSON.read_text())


CUDA_COLUMNS = {
    "registers": "registers",
    "shared": "shared, bytes",
    "spills": "spills",
    "warps": "warps / SM",
    "slots": "instructions",
    "mufu": "MUFU",
    "product_clocks": "tensor clocks",
    "counted_us": "counted, us",
    "limit_us": "limit, us",
}
TRITON_COLUMNS = {"n_regs": "registers", "shared": "shared, bytes", "n_spills": "spills"}


def page(result: dict) -> str:
    """The tables as a Markdown page."""
    cuda, triton = result["cuda"], result["triton"]
    return "\n".join(
        [
            "# What the compilers make of the GPU kernels",
            "",
            "Made by `python -m benchmarks.static --write`; a test fails when a kernel gets worse. "
            "Counted, not measured:",
            "nothing here ran on a GPU. Instructions, exponentials (MUFU) and clocks of the tensor "
            "core are per attention weight",
            "of a lane (per sum of the convolution in `conv_stem`), of the innermost loop with all "
            "its branches; counted time is",
            "that of the busiest unit of an H200 for "
            f"B = {ATTENTION['B']}, N = {ATTENTION['N']}, H x D = {ATTENTION['C']} "
            f"({STEM['B']} images of {STEM['pixels']} x {STEM['pixels']} and {STEM['C']} channels",
            "for `conv_stem`), and the limit is that of `benchmarks/limits.py` (16 bits).",
            "",
            f"## CUDA, {ARCHITECTURE}, nvcc {result['versions']['nvcc']}",
            "",
            *_table(cuda, CUDA_COLUMNS),
            "",
            f"## Triton {result['versions']['triton']}, sm_90",
            "",
            *_table(triton, TRITON_COLUMNS),
            "",
        ]
    )


def _table(rows, columns) -> list[str]:
    lines = ["| kernel | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = ("" if row[key] is None else str(row[key]) for key in columns)
        shown = re.sub(r"(\w+)_ptr=None", r"no \1", _name(row))
        lines.append(f"| `{shown}` | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Print the page, and keep it if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"keep it: {JSON.name}, {PAGE.name}")
    write = parser.parse_args().write
    import sass

    if (missing := sass.unusable()) is not None:
        print(f"error: {missing}", file=sys.stderr)
        return 2
    result = {"versions": versions(), "cuda": cuda_rows(), "triton": triton_rows()}
    print(page(result))
    if write:
        JSON.write_text(json.dumps(result, indent=1) + "\n")
        PAGE.write_text(page(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
