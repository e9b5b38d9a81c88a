"""The table that is made of benchmark results."""

import json

import pytest

from benchmarks import ratios


def entry(group, param, method, median):
    return {
        "group": group,
        "param": param,
        "params": {"method": method},
        "stats": {"median": median},
    }


def test_ratios_are_those_to_ours_and_losers_stay(tmp_path, capsys):
    file = tmp_path / "results.json"
    entries = [
        entry("attention-fwd", "sdpa-B4-p0.1", "sdpa", 0.006),
        entry("attention-fwd", "ours-B4-p0.1", "ours", 0.002),
        entry("attention-fwd", "ours-cpp-B4-p0.1", "ours-cpp", 0.001),
        entry("attention-fwd", "ours-B8-p0", "ours", 3e-6),
        entry("stem", "float32-(1, 2)-ours", "ours", 2.5),
        entry("stem", "float32-(1, 2)-eager", "eager", 5),
        entry("alone", "eager", "eager", 5),
    ]
    file.write_text(json.dumps({"benchmarks": entries}))
    assert ratios.main([str(file)]) == 0
    out = capsys.readouterr().out
    assert "| case | ours | sdpa | ours-cpp |" in out
    assert "| B4-p0.1 | 2 ms | 3.00x | 0.50x |" in out
    assert "| B8-p0 | 3 us |  |  |" in out
    assert "| float32-(1, 2) | 2.5 s | 2.00x |" in out
    assert "alone" not in out


@pytest.mark.parametrize("files", [[], ["nowhere.json"]])
def test_missing_files_are_told(files, capsys):
    assert ratios.main(files) == 2
    assert "usage" in capsys.readouterr().out
