"""The default backend on a CPU is the fastest: measured, on a part of the benchmark's grid."""

import time

import pytest
import torch

from benchmarks import dispatch
from lsmha_fast._ext import ext_missing

# the corners, and where the table changes: many and few heads, short and long, narrow and wide
CASES = [
    case
    for case in dispatch.GRID
    if case.D in (1, 4, 16, 64) and case.N in (16, 197) and (case.B * case.H <= 2 or case.N < 197)
]


@pytest.fixture(autouse=True)
def one_thread():
    """So that the processor time of this process is what a call takes, whatever else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(ext_missing() is not None, reason=str(ext_missing()))
def test_the_default_backend_is_the_fastest():
    torch.manual_seed(0)
    lost = [
        f"{r.case}: {r.choice} takes {r.loss:.2f} times as long as {r.best}"
        for r in dispatch.losers(CASES, time.process_time)
    ]
    assert not lost, "\n".join(lost)


def test_the_grid_covers_what_it_shall():
    grid = dispatch.GRID
    assert {c.D for c in grid} >= {1, 2, 4, 8, 16, 32, 64}
    assert min(c.N for c in grid) == 16
    assert max(c.N for c in grid) == 512
    assert {c.dtype for c in grid} == {torch.float32, torch.bfloat16}
    assert len({c.B * c.H for c in grid}) > 1
    assert {c.backward for c in grid} == {False, True}
    assert len(CASES) >= 40


def test_a_slow_choice_is_found(monkeypatch):
    case = next(c for c in dispatch.GRID if c.N == 197 and c.D == 1 and c.B == 2 and not c.backward)
    real = dispatch.candidates

    def worst(case):
        _, calls = real(case)
        return "reference", calls

    monkeypatch.setattr(dispatch, "candidates", worst)
    if ext_missing() is None:
        assert dispatch.losers([case], time.process_time)[0].choice == "reference"
