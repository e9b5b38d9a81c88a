"""Seeds, the interpreter where there is no GPU, and the gpu marker."""

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
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    """What tests measured, by `record_property("figure", line)`."""
    reports = terminalreporter.getreports("passed")
    lines = [value for r in reports for name, value in r.user_properties if name == "figure"]
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.line(line)
