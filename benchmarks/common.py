"""What every benchmark needs: the device, a timer that waits for it, and facts for the JSON."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import time
from pathlib import Path

import torch

from benchmarks import limits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sync_timer() -> float:
    """Seconds, after all queued device work has ended.

    A round is then sync, N launches, sync: the cost of the wait is divided by N, which
    pytest-benchmark calibrates.
    """
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def info(benchmark, *, flops=None, bytes=None, exps=None, error=None, **facts) -> None:
    """Write what one call must do into the benchmark's `extra_info`.

    Args:
        benchmark: the pytest-benchmark fixture.
        flops: floating-point operations of the definition (a multiply-add counts 2).
        bytes: least traffic, each input read once and each output written once.
        exps: exponentials of the definition.
        error: max abs error against fp64 on the same inputs, divided by the max of the result.
        **facts: anything else worth keeping.
    """
    counts = {"flops": flops, "bytes": bytes, "exps": exps, "error": error, **facts}
    benchmark.extra_info.update({k: v for k, v in counts.items() if v is not None})
    benchmark.extra_info.update(device=device_name(), torch=torch.__version__)


def device_name() -> str:
    """The GPU's name, or the number of CPU threads."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def relative_error(actual: torch.Tensor, high: torch.Tensor) -> float:
    """Largest difference from the fp64 result, as a share of its largest value."""
    high = high.double()
    return float((actual.double() - high).abs().max() / high.abs().max().clamp_min(1e-300))


def machine() -> dict:
    """Device, versions, clocks and rates, for the JSON of a run."""
    names = ("torch", "triton", "numpy", "lsmha_fast")
    found = {n: importlib.metadata.version(n) for n in names if importlib.util.find_spec(n)}
    return {
        "device": device_name(),
        "processor": processor(),
        "versions": found,
        "clocks": clocks(),
        "rates": gpu_rates() if DEVICE == "cuda" else cpu_rates(),
    }


def processor() -> str:
    """The GPU's name, or the CPU's as the system tells it, with its widest vectors."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    parts = [fields.get("model name", "CPU").strip()]
    if "cpu family" in fields:
        parts.append(f"family {fields['cpu family'].strip()} model {fields['model'].strip()}")
    return ", ".join([*parts, torch.backends.cpu.get_cpu_capability()])


def clocks() -> str | None:
    """What the driver says of a GPU's clocks while it is idle or not; None on a CPU."""
    if DEVICE != "cuda":
        return None
    query = "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,power.limit,driver_version"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def gpu_rates() -> dict | None:
    """Bytes, matrix operations and exponentials per second of a GPU that `limits` knows."""
    name = torch.cuda.get_device_name()
    known = next((d for n, d in limits.DEVICES.items() if n in name), None)
    if known is None:
        return None
    exps = known.multiprocessors * known.mufu * known.clock
    return {"bytes": known.hbm, "flops": known.matrix, "exps": exps}


def cpu_rates() -> dict:
    """Bytes and fp32 operations per second that this CPU reached just now, by a sum and products.

    The products are PyTorch's own and oneDNN's with sorted weights: on some processors the first
    are far from the limit. An exponential takes at least three multiply-adds (range reduction and a
    polynomial of degree five share the units with them): 6 operations.
    """
    x = torch.randn(64 << 20)
    a, weight = torch.randn(1024, 1024), torch.randn(1024, 1024)
    products = [lambda: a @ weight]
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1024)
        fused = torch.ops.mkldnn._linear_pointwise
        products.append(lambda: fused(a, packed, None, "none", [], ""))
    flops = 2 * 1024**3 / min(_best_time(product) for product in products)
    return {
        "bytes": x.numel() * 4 / _best_time(x.sum),
        "flops": flops,
        "exps": flops / 6,
    }


def _best_time(call, rounds: int = 7) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
