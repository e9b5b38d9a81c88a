"""Whether attention's default backend on a CPU is the fastest one: `python -m benchmarks.dispatch`.

Walks a grid of shapes, dtypes and directions, measures every backend that takes the call in turns,
and prints the cases in which the one that `backend=None` takes needs more than 10 % longer than the
best. "torch" is PyTorch's own function, called without this package: it has no part in the verdict,
since its lead where a call takes microseconds is that of any call into an op of this package. With
--threads 1 times are those of the processor, which other programs do not change.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.interleaved import medians
from lsmha_fast.ops import attention
from lsmha_fast.ops.attention.op import CHECKS, default_backend

TOLERANCE = 1.1
# a call that loses is measured again with more rounds before it counts
ROUNDS = (1, 9, 27)


class Case(NamedTuple):
    """One call: (B, H, N, D) views of a packed projection, as the module has them."""

    B: int
    H: int
    N: int
    D: int
    dtype: torch.dtype
    backward: bool

    def __str__(self) -> str:
        direction = "forward + backward" if self.backward else "forward"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"B={self.B} H={self.H} N={self.N} D={self.D} {dtype} {direction}"


class Result(NamedTuple):
    """Seconds of every function, and the backend that `backend=None` takes."""

    case: Case
    choice: str
    seconds: dict[str, float]

    @property
    def best(self) -> str:
        return min((n for n in self.seconds if n != "torch"), key=lambda name: self.seconds[name])

    @property
    def loss(self) -> float:
        """Time of the choice over that of the best candidate."""
        return self.seconds[self.choice] / self.seconds[self.best]


GRID = [
    Case(*shape, N, D, dtype, backward)
    for shape, N, D, dtype, backward in itertools.product(
        [(1, 2), (2, 32)],
        (16, 64, 197, 512),
        (1, 2, 3, 4, 8, 12, 16, 32, 64),
        (torch.float32, torch.bfloat16),
        (False, True),
    )
]


def candidates(case: Case):
    """The backend that `backend=None` takes, and for each backend a function that runs the case."""
    B, H, N, D, dtype, backward = case
    qkv = torch.randn(B, N, 3, H, D).to(dtype).requires_grad_(backward)
    grad = torch.randn(B, N, H, D).to(dtype).transpose(1, 2)

    def run(function):
        q, k, v = qkv.transpose(1, 3).unbind(2)
        if not backward:
            with torch.no_grad():
                return function(q, k, v)
        return torch.autograd.grad(function(q, k, v), qkv, grad)

    def of_backend(name):
        return lambda: run(lambda q, k, v: attention(q, k, v, backend=name))

    q = qkv.transpose(1, 3)[:, :, 0]
    names = [
        n for n, check in CHECKS.items() if n != "triton" and check(q, None, None, 0.0) is None
    ]
    calls = {name: of_backend(name) for name in names}
    calls["torch"] = lambda: run(F.scaled_dot_product_attention)
    return default_backend(q), calls


def measure(case: Case, timer: Callable[[], float] = time.perf_counter) -> Result:
    """Times of all candidates, with more rounds as long as the choice loses."""
    choice, calls = candidates(case)
    for rounds in ROUNDS:
        result = Result(case, choice, medians(calls, rounds, timer))
        if result.loss <= TOLERANCE:
            break
        calls = {n: calls[n] for n in (choice, result.best)}
    return result


def losers(cases: Iterable[Case], timer: Callable[[], float] = time.perf_counter) -> list[Result]:
    """Cases in which `backend=None` is more than 10 % slower than the best backend."""
    results = (measure(case, timer) for case in cases)
    return [result for result in results if result.loss > TOLERANCE]


def main() -> None:
    """Print every loser of the grid, the largest loss first; with --all, every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="print every case, not losers alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    timer = time.process_time if options.threads == 1 else time.perf_counter
    results = [measure(case, timer) for case in GRID]
    for result in sorted(results, key=lambda r: -r.loss):
        if options.all or result.loss > TOLERANCE:
            times = ", ".join(f"{n} {1e6 * s:.0f} us" for n, s in result.seconds.items())
            print(f"{result.case}: {result.choice}, {result.loss:.2f} of {result.best} ({times})")
    lost = sum(result.loss > TOLERANCE for result in results)
    print(f"{lost} of {len(results)} cases lose more than {TOLERANCE - 1:.0%}")


if __name__ == "__main__":
    main()
