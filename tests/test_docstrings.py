"""Docstrings of the public API: there, complete, and about the arguments that there are."""

import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("", ".ops", ".nn", ".models", ".deploy", ".analysis", ".data", ".train")
# ruff's rules: a docstring there, no section without its matter, every error raised here named
RULES = ["D101", "D102", "D103", "DOC102", "DOC202", "DOC402", "DOC403", "DOC501"]
RETURNS = "DOC201"  # of functions; what a short method gives, its first line says


def public_objects():
    """Exported classes and functions by their full name."""
    found = {}
    for layer in LAYERS:
        module = importlib.import_module(f"lsmha_fast{layer}")
        for value in (getattr(module, name) for name in dir(module) if not name.startswith("_")):
            ours = str(getattr(value, "__module__", "")).startswith("lsmha_fast")
            if ours and (inspect.isclass(value) or inspect.isfunction(value)):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


PUBLIC = public_objects()


@pytest.fixture(scope="module")
def complaints():
    """What ruff says about docstrings of the package: (file, line, code, message)."""
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--preview", "--no-cache"]
    command += ["--select", ",".join([*RULES, RETURNS]), "--output-format", "json", "lsmha_fast"]
    command += ["--config", 'lint.pydocstyle.convention="google"']
    command += ["--config", "lint.pydoclint.ignore-one-line-docstrings=true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return [
        (Path(c["filename"]), c["location"]["row"], c["code"], c["message"])
        for c in json.loads(done.stdout)
    ]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_complete(name, complaints):
    value = PUBLIC[name]
    lines, start = inspect.getsourcelines(value)
    path, rows = Path(inspect.getsourcefile(value)), range(start, start + len(lines))
    found = [c for c in complaints if c[0] == path and c[1] in rows]
    found = [c for c in found if c[2] != RETURNS or inspect.isfunction(value)]
    assert not found, "\n".join(f"{path.name}:{row}: {code} {text}" for _, row, code, text in found)


@pytest.mark.parametrize("name", [n for n in PUBLIC if not hasattr(PUBLIC[n], "_fields")])
def test_arguments_are_those_of_the_signature(name):
    """The section Args names exactly these; a docstring without one names them in its text."""
    value = PUBLIC[name]
    text = inspect.getdoc(value)
    if dataclasses.is_dataclass(value) and all(f.metadata for f in dataclasses.fields(value)):
        assert all(f.metadata["help"] for f in dataclasses.fields(value))
        return
    try:
        expected = set(inspect.signature(value).parameters)
    except ValueError:
        pytest.skip("an exception, which takes its message")
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    if section is None:
        named = {p for p in expected if re.search(rf"\b{p}\b", text)}
    else:
        entries = re.findall(r"^    (\S[*\w, ]*):", section[1], re.MULTILINE)
        named = {p.strip("* ") for entry in entries for p in entry.split(",")}
    assert named == expected
