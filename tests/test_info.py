"""`lsmha info`: every backend and extra in a line, and for what is missing reason and remedy."""

import re
import sys
from pathlib import Path

import pytest
import torch

from lsmha_fast import _ext, info
from lsmha_fast.cli import main
from lsmha_fast.ops import _triton_utils

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.fixture
def lines(capsys):
    """What `lsmha info` says, by what each line is about."""

    def run():
        assert main(["info"]) == 0
        return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[1:])

    return run


@pytest.fixture
def hide(monkeypatch):
    """Make modules impossible to import."""

    def run(*names):
        _ext._load.cache_clear()
        for name in names:
            # None in sys.modules is Python's way to say that a module does not exist
            monkeypatch.setitem(sys.modules, name, None)

    yield run
    _ext._load.cache_clear()


def test_every_backend_has_a_line(lines):
    found = lines()
    backends = {"reference", "triton", "cpp", "cuda"}
    assert {f"backend {name}" for name in backends} <= set(found)
    assert found["backend reference"] == "ready"


def test_without_the_extension(lines, hide, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    hide("lsmha_fast._C", "lsmha_fast._C_cuda")
    found = lines()
    for backend, library in (("cpp", "_C"), ("cuda", "_C_cuda")):
        reason = found[f"backend {backend}"]
        assert reason.startswith(f"the native extension lsmha_fast.{library} is not built; ")
        assert "pip install --no-build-isolation ." in reason


def test_without_cuda(lines, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = lines()
    assert found["backend cuda"] == f"torch {torch.__version__} is not a CUDA build"
    assert found[f"torch {torch.__version__} (CUDA build none)"].startswith("no CUDA device")


def test_without_a_gpu(lines, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_ext, "_load", lambda name: None)
    monkeypatch.setattr(_triton_utils, "_INSTALLED", True)
    found = lines()
    for backend in ("cuda", "triton"):
        assert found[f"backend {backend}"].endswith("but there is no CUDA device to run on")


def test_without_triton(lines, monkeypatch):
    monkeypatch.setattr(_triton_utils, "_INSTALLED", False)
    assert lines()["backend triton"] == "Triton is not installed (pip install triton)"


def test_without_the_extras(lines, monkeypatch):
    def version(name):
        raise info.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(info.metadata, "version", version)
    found = lines()
    for extra, names in info.EXTRAS.items():
        packages, remedy = found[f"extra {extra}"].split("; ")
        assert packages == ", ".join(f"{name} missing" for name in names)
        assert remedy == f"pip install 'lsmha_fast[{extra}]'"


def test_without_torch(lines, hide):
    hide("torch")
    assert lines()["torch"].startswith("missing (pip install torch); only `lsmha info`")


@pytest.mark.parametrize("extra", info.EXTRAS)
def test_extras_are_those_of_the_package(extra):
    listed = re.search(rf"^{extra} = \[(.*)\]$", PYPROJECT.read_text(), re.MULTILINE).group(1)
    assert tuple(re.findall(r'"([\w-]+)', listed)) == info.EXTRAS[extra]
