"""What documents say of speed is what benchmarks/results/ holds, and that is what was measured."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import conftest, record, report


def entry(group, param, method, median, **facts):
    return {
        "group": group,
        "param": param,
        "params": {"method": method},
        "stats": {"median": median, "iqr": median / 10, "rounds": 7},
        "extra_info": {"device": "cpu, 2 threads", **facts},
    }


def raw(*entries, processor="Some CPU"):
    machine = {
        "device": "cpu, 2 threads",
        "processor": processor,
        "versions": {"torch": "2.14.1"},
        "clocks": None,
        "rates": {"bytes": 1e10, "flops": 1e11, "exps": 1e10},
    }
    return json.dumps(
        {
            "machine_info": {"lsmha_fast": machine},
            "datetime": "2026-11-26T12:00:00",
            "benchmarks": entries,
        }
    )


@pytest.fixture
def results(tmp_path):
    shapes = {1: "B8-N256-H256-D1-p0.0", 4: "B8-N256-H64-D4-p0.0"}
    entries = [
        entry("attention-fwd", f"{method}-{case}", method, seconds * (1 + D), flops=1e7, exps=2e6)
        for D, case in shapes.items()
        for method, seconds in (("sdpa", 0.006), ("ours", 0.002), ("ours-cpp", 0.001))
    ]
    entries += [
        entry("seq-pool-fwd", "float32-(8, 256, 64, 4)-ours", "ours", 3e-6, bytes=1e4, error=1e-7),
        entry("seq-pool-fwd", "float32-(8, 256, 64, 4)-eager", "eager", 1.5e-6),
        entry("seq-pool-fwd", "alone", "other", 5),
    ]
    file = tmp_path / "raw.json"
    file.write_text(raw(*entries))
    assert record.main([str(file), "--results", str(tmp_path / "results")]) == 0
    return tmp_path / "results"


def test_documents_are_those_of_the_results(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_results_are_kept_by_processor_and_group(results):
    assert sorted(p.relative_to(results).as_posix() for p in results.rglob("*.json")) == [
        "some-cpu/attention-fwd.json",
        "some-cpu/seq-pool-fwd.json",
    ]
    cases = json.loads((results / "some-cpu/seq-pool-fwd.json").read_text())["cases"]
    row = cases["float32-(8, 256, 64, 4)"]["ours"]
    assert row["median"] == 3e-6
    assert row["share"] == pytest.approx(1e4 / 1e10 / 3e-6, rel=1e-4)


def test_what_was_measured_in_turns_is_what_is_kept(tmp_path):
    file = tmp_path / "turns.json"
    file.write_text(
        raw(entry("host-overhead", "attention, forward-ours", "ours", 9e-6, seconds=8e-6))
    )
    groups = record.read(file)
    assert groups["host-overhead"]["cases"]["attention, forward"]["ours"]["median"] == 8e-6


def test_a_second_run_adds_its_cases(results, tmp_path):
    file = tmp_path / "more.json"
    file.write_text(raw(entry("seq-pool-fwd", "float32-(9, 9)-ours", "ours", 1e-3)))
    record.main([str(file), "--results", str(results)])
    cases = json.loads((results / "some-cpu/seq-pool-fwd.json").read_text())["cases"]
    assert {"float32-(8, 256, 64, 4)", "float32-(9, 9)"} <= set(cases)


def test_tables_show_ratios_and_losers(results):
    tables = report.readme_tables(report.load(results))
    assert "| attention, 256 tokens, H x D = 256 | D=1 | D=4 |" in tables
    assert "| forward: `sdpa` / ours | 3 | 3 |" in tables
    assert "ours-cpp" not in tables
    assert "| float32-(8, 256, 64, 4) | 3 us | `eager` 0.5 |" in tables
    page = report.page(report.load(results))
    assert "| B8-N256-H64-D4-p0.0 | `ours-cpp` | 5 ms | 0.5 |" in page
    assert "| alone | `other` | 5 s |" in page


def test_work_that_shares_a_unit_is_added_on_a_cpu():
    facts = {"flops": 4e11, "exps": 1e10, "bytes": 1e10}
    rates = {"flops": 1e11, "exps": 1e10, "bytes": 1e10}
    assert record.least_seconds(facts | {"device": "cpu, 1 threads"}, rates) == 5
    assert record.least_seconds(facts | {"device": "NVIDIA H200"}, rates) == 4
    assert record.least_seconds(facts, None) is None
    assert record.least_seconds({}, rates) is None


def test_a_picture_is_drawn_where_there_is_something_to_draw(results, tmp_path):
    pytest.importorskip("matplotlib")
    (groups,) = report.load(results).values()
    assert report.picture(groups, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000
    assert not report.picture({"seq-pool-fwd": groups["seq-pool-fwd"]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"benchmarks": []}'])
def test_other_files_are_refused(text, tmp_path, capsys):
    (tmp_path / "x.json").write_text(text)
    assert record.main([str(tmp_path / "x.json"), "--results", str(tmp_path / "r")]) == 2
    assert "x.json is no JSON of `pytest benchmarks/`" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="README.md lacks"):
        report.with_tables("nothing", "tables")


def test_no_speed_is_printed_while_tests_are_red(monkeypatch):
    calls, cache = [], {}

    def run(command, **_):
        calls.append(command[-1])
        return SimpleNamespace(returncode=status, stdout="1 failed")

    monkeypatch.setattr(subprocess, "run", run)
    options = SimpleNamespace(collectonly=False, tests_passed=False)
    store = SimpleNamespace(get=cache.get, set=cache.__setitem__)
    items = [SimpleNamespace(path=Path(f"bench_{n}.py")) for n in ("seq_pool", "train_step")]
    session = SimpleNamespace(items=items, config=SimpleNamespace(option=options, cache=store))
    status = 1
    with pytest.raises(pytest.exit.Exception, match=r"test_seq_pool.py is red.*\n1 failed"):
        conftest.pytest_collection_finish(session)
    status = 0
    conftest.pytest_collection_finish(session)
    conftest.pytest_collection_finish(session)  # the sources have not changed
    assert len(calls) == 2
    options.tests_passed, store.get = True, None
    conftest.pytest_collection_finish(session)
