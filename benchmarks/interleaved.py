"""Times of functions that do the same, measured in turns so that all meet the same noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

# a round of one function lasts at least so long, whatever one call takes
ROUND_SECONDS = 0.002


def medians(
    calls: Mapping[str, Callable], rounds: int = 9, timer: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of one call of each function; round by round, every function has its turn.

    Args:
        calls: functions without arguments, by name. Each is called once before any is timed.
        rounds: turns of each function.
        timer: seconds; `time.process_time` leaves out other programs, for calls of one thread.
    """
    repeats = {name: _repeats(call, timer) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = timer()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((timer() - start) / repeats[name])
    return {name: statistics.median(times) for name, times in seconds.items()}


def _repeats(call: Callable, timer: Callable[[], float]) -> int:
    call()
    start = timer()
    call()
    return max(1, round(ROUND_SECONDS / max(timer() - start, 1e-6)))
