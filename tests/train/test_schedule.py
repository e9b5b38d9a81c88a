"""The learning-rate curve at its corners."""

import math

import pytest

from lsmha_fast.train.schedule import cosine_lr

RECIPE = {"epochs": 300, "lr": 6e-4, "min_lr": 1e-5, "warmup_lr": 1e-6, "warmup_epochs": 10}


@pytest.mark.parametrize(
    "epoch, expected",
    [
        (0, 1e-6),
        (5, 1e-6 + (6e-4 - 1e-6) / 2),
        (10, 1e-5 + (6e-4 - 1e-5) * 0.5 * (1 + math.cos(math.pi / 30))),
        (150, (6e-4 + 1e-5) / 2),
        (300, 1e-5),
        (310, 1e-5),
    ],
)
def test_corners(epoch, expected):
    assert cosine_lr(epoch, **RECIPE) == pytest.approx(expected)


def test_no_warmup():
    assert cosine_lr(0, **RECIPE | {"warmup_epochs": 0}) == pytest.approx(6e-4)
