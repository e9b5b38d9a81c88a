"""Fixtures of the analysis tests."""

import pytest
from tiny_model import TinyModel, random_batches


@pytest.fixture
def model():
    return TinyModel().train()


@pytest.fixture
def batches():
    return random_batches()
