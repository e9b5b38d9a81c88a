"""Docstrings of the public API: ruff's rules on every exported name, and every argument named."""

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
# there at all, every argument and no other in Args, what is returned and raised
RULES = "D101,D102,D103,D417,DOC102,DOC201,DOC202,DOC402,DOC403,DOC501,DOC502"


def public_objects():
    """Exported classes and functions with a qualified name, each once."""
    found = {}
    for layer in LAYERS:
        module = importlib.import_module(f"lsmha_fast{layer}")
        for name in dir(module):
            value = getattr(module, name)
            if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            if value.__module__.startswith("lsmha_fast"):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


PUBLIC = public_objects()


@pytest.fixture(scope="module")
def complaints():
    """What ruff says about docstrings of the package: (file, line, message)."""
    settings = ['lint.pydocstyle.convention="google"', "lint.pydoclint.ignore-one-line-docstrings=true"]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--preview", "--no-cache"]
    command += ["--select", RULES, "--output-format", "json", "lsmha_fast"]
    for setting in settings:
        command += ["--config", setting]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return [
        (Path(c["filename"]), c["location"]["row"], f"{c['code']} {c['message']}")
        for c in json.loads(done.stdout)
    ]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_complete(name, complaints):
    value = PUBLIC[name]
    lines, start = inspect.getsourcelines(value)
    path, end = Path(inspect.getsourcefile(value)), start + len(lines)
    found = [text for file, row, text in complaints if file == path and start <= row < end]
    assert not found, "\n".join(found)


def parameters(value):
    """Names of the arguments that a caller gives."""
    names = list(inspect.signature(value).parameters)
    return [name for name in names if name not in ("self", "args", "kwargs")]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_named(name):
    """In the section Args, or, in a shorter docstring, in its text."""
    value = PUBLIC[name]
    if inspect.isclass(value) and hasattr(value, "_fields"):
        pytest.skip("the fields of a tuple are documented where they stand")
    text = inspect.getdoc(value) or ""
    missing = [n for n in parameters(value) if not re.search(rf"\b{n}\b", text)]
    assert not missing, f"{name}: {missing}"
