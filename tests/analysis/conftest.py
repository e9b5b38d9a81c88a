"""Fixtures of the analysis tests."""

import pytest
import torch
from tiny_model import TinyModel, random_batches


@pytest.fixture(autouse=True)
def _one_thread():
    # on tensors this small threads only wait for each other, on a busy machine for seconds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    return TinyModel().train()


@pytest.fixture
def batches():
    return random_batches()
