"""The benchmarks that are commands: what they print, at a size that takes no time."""

import re
import shutil
import sys

import pytest

from benchmarks import cpu_attention, cpu_cycles, interleaved


def test_medians_tell_slow_from_fast():
    seconds = interleaved.medians({"slow": lambda: sum(range(20000)), "fast": lambda: None}, 3)
    assert seconds["slow"] > seconds["fast"] > 0


def test_cpu_attention_prints_one_row_per_head_dim(monkeypatch, capsys):
    small = ["--batch", "1", "--tokens", "16", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["cpu_attention", *small])
    cpu_attention.main()
    rows = re.findall(r"^\| (\d+) \| [\d.]+ \| [\d.]+ \|$", capsys.readouterr().out, re.MULTILINE)
    assert rows == ["1", "2", "4", "8", "16", "32", "64"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_cpu_cycles_of_the_portable_kernels(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    clock, rows = cpu_cycles.run()
    assert 0.5 < clock < 10
    assert [row[0] for row in rows] == [1, 2, 4, 8, 16, 32]
    assert all(cycles > 1 for row in rows for cycles in row[1:])
