"""Benchmarks are the files `bench_*.py`; the pytest defaults would not find them."""

import pytest


def pytest_collect_file(file_path, parent):
    named = parent.session.isinitpath(file_path)  # pytest collects those by itself
    if file_path.match("bench_*.py") and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None
