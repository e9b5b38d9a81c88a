"""Latency of the forms of a model: percentiles of single calls, all variants in turn."""

from __future__ import annotations

import copy
import math
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..models import CCT
from .variants import VARIANTS, Call, Unavailable

# rounds over the variants, so that a machine that grows slower does so for all
ROUNDS = 3
FEWEST_CALLS = 5


@dataclass(frozen=True)
class Row:
    """Time of one call of one variant at one batch size."""

    variant: str
    dtype: str
    batch: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    images_per_s: float
    calls: int
    error: float  # largest difference of a logit from fp64, over the largest logit


@dataclass(frozen=True)
class Skipped:
    """A variant that was not measured at a batch size, and why."""

    variant: str
    dtype: str
    batch: int
    reason: str


@dataclass(frozen=True)
class Budget:
    """How to measure: seconds per variant and batch, the longest call worth repeating, the timer.

    `cpu_time` counts the processor time of the calling thread, which other load on the machine
    hardly disturbs; it means something on a CPU with one thread.
    """

    seconds: float = 2.0
    longest_call: float = 10.0
    cpu_time: bool = False

    @property
    def timer(self) -> Callable[[], float]:
        """Seconds since some moment."""
        return time.thread_time if self.cpu_time else time.perf_counter


def percentile(sorted_values: Sequence[float], q: float) -> float:
    """The smallest value that at least a share q of the values do not exceed."""
    return sorted_values[max(math.ceil(q * len(sorted_values)) - 1, 0)]


def measure(
    model: CCT,
    batches: Sequence[int],
    dtypes: Sequence[torch.dtype],
    variants: Sequence[str],
    device: torch.device,
    budget: Budget | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[Row], list[Skipped]]:
    """Measure variants of a model on random images.

    Every variant is warmed up by calls for a tenth of its time (at least two), then timed call by
    call in three rounds that go over all variants. The logits of each are compared with fp64.

    Args:
        model: a CCT in evaluation mode.
        batches: images per call.
        dtypes: of weights and tokens.
        variants: names in `VARIANTS`.
        device: where.
        budget: see `Budget`.
        progress: called with a line now and then.

    Returns:
        What was measured, and what was not, with reasons.

    Raises:
        ValueError: an unknown variant.
    """
    unknown = sorted(set(variants) - set(VARIANTS))
    if unknown:
        raise ValueError(f"unknown variant {unknown[0]!r}; choose from {', '.join(VARIANTS)}")
    budget = budget or Budget()
    rows: list[Row] = []
    skipped: list[Skipped] = []
    cost: dict[tuple[str, str], float] = {}  # seconds of an image
    for batch in sorted(batches):
        images = torch.randn(batch, *_image_shape(model), device=device)
        with torch.no_grad():
            few = images[: min(batch, 8)].cpu()
            high = _on_cpu_in_fp64(model)(few.double())
        ready: list[tuple[str, str, Call, float]] = []
        for dtype in dtypes:
            for name in variants:
                key = name, str(dtype).removeprefix("torch.")
                if cost.get(key, 0.0) * batch > budget.longest_call:
                    reason = f"a call would take about {cost[key] * batch:.0f} s"
                    skipped.append(Skipped(*key, batch, reason))
                    continue
                if progress is not None:
                    progress(f"batch {batch}: {name}, {key[1]}")
                try:
                    call = VARIANTS[name](model, images, dtype)
                    cost[key] = _warm_up(call, budget.seconds / 10, budget.timer) / batch
                    error = _error(call, high)
                except Unavailable as reason:
                    skipped.append(Skipped(*key, batch, str(reason)))
                    continue
                ready.append((*key, call, error))
        times: list[list[float]] = [[] for _ in ready]
        for _ in range(ROUNDS):
            for (_, _, call, _), seconds in zip(ready, times, strict=True):
                seconds += _time_calls(call, budget.seconds / ROUNDS, budget.timer)
        for (name, kind, _, error), seconds in zip(ready, times, strict=True):
            rows.append(_row(name, kind, batch, sorted(seconds), error))
    return rows, skipped


def _image_shape(model: CCT) -> tuple[int, int, int]:
    return model.stem.convs[0].in_channels, model.img_size, model.img_size


def _on_cpu_in_fp64(model: CCT) -> torch.nn.Module:
    return copy.deepcopy(model).cpu().double().eval()


def _warm_up(call: Call, seconds: float, timer: Callable[[], float]) -> float:
    """Call at least twice and for so long; the seconds of the last call."""
    call()  # compiles what is compiled on first use
    end = timer() + seconds
    while True:
        start = timer()
        call()
        now = timer()
        if now >= end:
            return now - start


def _time_calls(call: Call, seconds: float, timer: Callable[[], float]) -> list[float]:
    times: list[float] = []
    end = timer() + seconds
    while len(times) < FEWEST_CALLS or timer() < end:
        start = timer()
        call()
        times.append(timer() - start)
    return times


def _error(call: Call, high: torch.Tensor) -> float:
    logits = call()
    assert isinstance(logits, torch.Tensor)
    few = logits[: len(high)].double().cpu()
    return float((few - high).abs().max() / high.abs().max())


def _row(name: str, dtype: str, batch: int, seconds: list[float], error: float) -> Row:
    p50, p95, p99 = (1e3 * percentile(seconds, q) for q in (0.5, 0.95, 0.99))
    return Row(name, dtype, batch, p50, p95, p99, 1e3 * batch / p50, len(seconds), error)


def summary(
    rows: Sequence[Row], skipped: Sequence[Skipped], device: torch.device, command: str
) -> dict[str, Any]:
    """What `lsmha latency` writes as JSON: the rows, and the machine they are of."""
    return {
        "device": device_name(device),
        "dtype": rows[0].dtype if rows else "",
        "rows": [asdict(row) for row in rows],
        "skipped": [asdict(row) for row in skipped],
        "command": command,
        "clock": clock(device),
        "versions": versions(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its vector instructions and PyTorch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = _cpuinfo()
    found = re.search(r"model name\s*:\s*(.+)", info)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {capability}, {torch.get_num_threads()} threads"


def clock(device: torch.device) -> str:
    """The clock at this moment, as far as the system tells."""
    if device.type == "cuda":
        try:
            return f"{torch.cuda.clock_rate(device)} MHz now, not locked by this program"
        except (RuntimeError, ModuleNotFoundError) as error:
            return f"unknown: {error}"
    rates = [float(rate) for rate in re.findall(r"cpu MHz\s*:\s*([\d.]+)", _cpuinfo())]
    if not rates:
        return "unknown"
    return f"{max(rates):.0f} MHz by /proc/cpuinfo, not locked"


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    found = {"lsmha_fast": __version__, "torch": torch.__version__}
    try:
        import onnxruntime

        found["onnxruntime"] = onnxruntime.__version__
    except ModuleNotFoundError:
        pass
    return found


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""
