"""Benchmarks are the files `bench_*.py`; none prints a speed while the tests of its op are red."""

import functools
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import common

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption(
        "--tests-passed", action="store_true", help="the tests have just passed: do not run them"
    )


def pytest_collect_file(file_path, parent):
    named = parent.session.isinitpath(file_path)  # pytest collects those by itself
    if file_path.match("bench_*.py") and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_finish(session):
    """Run the tests of every op that is about to be timed, unless they passed for these sources."""
    config = session.config
    if config.option.collectonly or config.option.tests_passed:
        return
    names = sorted({item.path.stem.removeprefix("bench_") for item in session.items})
    tests = [t for t in (ROOT / f"tests/ops/test_{name}.py" for name in names) if t.is_file()]
    for test in tests:
        key = f"lsmha_fast/{test.stem}"
        if config.cache.get(key, None) == sources(test):
            continue
        # builds for other devices say nothing about a speed here
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not build", str(test)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            lines = "\n".join(done.stdout.splitlines()[-20:])
            pytest.exit(f"{test.relative_to(ROOT)} is red: no speed is printed\n{lines}", 1)
        config.cache.set(key, sources(test))


def sources(test: Path) -> str:
    """Changes with everything that an op's tests depend on."""
    return f"{_kernels()} {hashlib.sha256(test.read_bytes()).hexdigest()[:16]}"


@functools.cache
def _kernels() -> str:
    found = hashlib.sha256(f"{torch.__version__} {common.device_name()}".encode())
    for pattern in ("csrc/*/*", "lsmha_fast/ops/**/*.py", "lsmha_fast/*.so"):
        for path in sorted(p for p in ROOT.glob(pattern) if p.is_file()):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["lsmha_fast"] = common.machine()
