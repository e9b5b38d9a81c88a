"""How the latency of a call grows with heads, tokens, depth and batch, as a picture.

python -m benchmarks.latency_growth OUT.png [--cpu-time]

Measures the optimised form and the published formulation in float32 with random weights; the
numbers go into OUT.json. With --cpu-time it is the processor time of one thread, for machines that
do other work, too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from lsmha_fast import create_model
from lsmha_fast.deploy.latency import Budget, device_name, measure

BASE = {"num_heads": 16, "dim": 256, "mlp_ratio": 2.0, "img_size": 32, "depth": 7}
# axis -> (argument of the model, or "batch"), its values, and what they are called
AXES = {
    "heads H": ("num_heads", (1, 4, 16, 64, 256)),
    "tokens N": ("img_size", (16, 24, 32, 48)),
    "blocks": ("depth", (1, 2, 4, 7)),
    "images in a call": ("batch", (1, 2, 4, 8)),
}
VARIANTS = ("optimized", "published")
CPU_TIME = "--cpu-time" in sys.argv
BUDGET = Budget(seconds=0.3, longest_call=3.0, cpu_time=CPU_TIME)


def measure_axis(argument: str, values) -> list[dict]:
    """One row per value and variant."""
    rows = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for value in values:
        batch = value if argument == "batch" else 1
        options = BASE if argument == "batch" else {**BASE, argument: value}
        torch.manual_seed(0)
        model = create_model("cct_7_3x1_32", 100, **options).eval()
        found, _ = measure(model, [batch], [torch.float32], VARIANTS, device, BUDGET)
        at = model.grid[0] * model.grid[1] if argument == "img_size" else value
        rows += [{"variant": row.variant, "at": at, "p50_ms": row.p50_ms} for row in found]
        print(argument, value, [f"{row.variant} {row.p50_ms:.2f} ms" for row in found], flush=True)
    return rows


def draw(record: dict, path: Path) -> None:
    """Four panels, both axes logarithmic."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axes, (name, rows) in zip(panels, record["axes"].items(), strict=True):
        for variant, colour in zip(VARIANTS, ("#0072b2", "#d55e00"), strict=True):
            mine = [row for row in rows if row["variant"] == variant]
            xs, ys = [row["at"] for row in mine], [row["p50_ms"] for row in mine]
            axes.loglog(xs, ys, "o-", color=colour, label=variant)
        axes.set_xlabel(name)
        axes.set_xticks([row["at"] for row in rows], [str(row["at"]) for row in rows])
        axes.minorticks_off()
    panels[0].set_ylabel(f"p50 of a call, {record['timer']} [ms]")
    panels[0].legend()
    figure.suptitle(f"cct_7_3x1, 16 heads, 32-pixel images but for what varies; {record['device']}")
    figure.savefig(path, dpi=150)


def main(out: Path) -> None:
    """Measure, write the numbers, draw."""
    if CPU_TIME:
        torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {
        "device": device_name(device),
        "torch": torch.__version__,
        "timer": "processor time" if CPU_TIME else "wall clock",
        "axes": {name: measure_axis(*axis) for name, axis in AXES.items()},
    }
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, out)
    print(f"written: {out}, {out.with_suffix('.json')}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
