"""What every benchmark needs: the device, a timer that waits for it, and facts for the JSON."""

from __future__ import annotations

import time

import torch

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
