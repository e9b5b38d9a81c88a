"""Images/s and memory of a training step as work grows: heads, tokens, batch, depth.

python -m benchmarks.train_cost [--quick]     one JSON object a line: the case, what it took

Every case varies one thing from cct_7_3x1_32 with 64 heads, in a process of its own, which also
gives its peak memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.bench_train_step import peak_of_process
from benchmarks.common import DEVICE, device_name, sync_timer
from lsmha_fast import create_model

BASE = {"heads": 64, "size": 32, "batch": 4 if DEVICE == "cpu" else 128, "depth": 7}
SWEEPS = {
    "heads": (4, 16, 64, 128, 256),
    "size": (32, 48, 64),
    "batch": (1, 4, 16) if DEVICE == "cpu" else (32, 128, 512),
    "depth": (2, 4, 7, 14),
}
QUICK = {"heads": (4, 64), "size": (32,), "batch": (2,), "depth": (2,)}


def cases(sweeps, base):
    """All cases, each once."""
    found = []
    for name, values in sweeps.items():
        found += [base | {name: value} for value in values]
    return [case for i, case in enumerate(found) if case not in found[:i]]


def measure(heads, size, batch, depth, rounds=5):
    """Median seconds of a step and the bytes it takes beyond model and images."""
    model = create_model("cct_7_3x1_32", 100, num_heads=heads, img_size=size, depth=depth)
    model = model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    labels = torch.randint(100, (batch,), device=DEVICE)
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else peak_of_process()
    seconds = []
    for _ in range(rounds + 1):
        start = sync_timer()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        seconds.append(sync_timer() - start)
    after = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak_of_process()
    median = statistics.median(seconds[1:])
    return {"images_per_s": round(batch / median, 1), "step_bytes": after - before}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("--case", type=json.loads, help="measure this one, in this process")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(**args.case)))
        return
    base = BASE | ({"batch": 2, "depth": 2} if args.quick else {})
    for case in cases(QUICK if args.quick else SWEEPS, base):
        row = case | {"tokens": (case["size"] // 2) ** 2, "device": device_name()}
        command = [sys.executable, "-m", "benchmarks.train_cost", "--case", json.dumps(case)]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        row |= json.loads(done.stdout) if done.returncode == 0 else {"failed": last[0]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
