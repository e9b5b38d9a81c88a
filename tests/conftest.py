"""Seeds, the interpreter where there is no GPU, and the markers gpu and triton."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    # Triton reads this when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device():
    """Where Triton kernels run: the GPU, else the CPU through the interpreter."""
    return DEVICE


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    no_gpu = not torch.cuda.is_available()
    no_triton = importlib.util.find_spec("triton") is None
    for item in items:
        if no_gpu and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if no_triton and needs_triton(item):
            item.add_marker(pytest.mark.skip(reason="needs Triton, which CPU builds of torch lack"))


def needs_triton(item):
    """Whether a test is marked so, or is a case of that backend."""
    case = getattr(item, "callspec", None)
    named = case is not None and "triton" in case.params.values()
    return named or item.get_closest_marker("triton") is not None


def pytest_terminal_summary(terminalreporter):
    """What tests measured, by `record_property("figure", line)`."""
    reports = terminalreporter.getreports("passed")
    lines = [value for r in reports for name, value in r.user_properties if name == "figure"]
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.line(line)
