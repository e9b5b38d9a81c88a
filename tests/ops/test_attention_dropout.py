"""The definition of attention's dropout: rate, independence, scale, Philox itself."""

import pytest
import torch

from lsmha_fast.ops import attention
from lsmha_fast.ops.attention import reference
from lsmha_fast.ops.attention.common import dropout_rule

SHAPE = (2, 3, 96, 192)  # B, H, L, S


def mask(dropout_p, seed=11):
    return reference.keep_mask(torch.tensor([seed]), SHAPE, dropout_p)


def assert_mean(sample, expected):
    """Within 4 standard deviations of a Bernoulli mean."""
    sigma = (expected * (1 - expected) / sample.numel()) ** 0.5
    assert abs(sample.double().mean() - expected) < 4 * sigma


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_rate(dropout_p):
    keep = mask(dropout_p)
    assert_mean(keep, 1 - dropout_p)
    # each of the 8 half-words of a call, each head and each query by itself
    for part in (*keep.unflatten(-1, (3, 8, 8)).unbind(-2), *keep.unbind(1), *keep.unbind(2)[:8]):
        assert_mean(part, 1 - dropout_p)


@pytest.mark.parametrize("dim, step", [(0, 1), (1, 1), (2, 1), (2, 8), (3, 1), (3, 8), (3, 64)])
def test_neighbours_are_independent(dim, step):
    keep = mask(0.5)
    n = keep.shape[dim] - step
    assert_mean(keep.narrow(dim, 0, n) == keep.narrow(dim, step, n), 0.5)


def test_seeds_are_independent():
    assert_mean(mask(0.5, 1) == mask(0.5, 2), 0.5)
    assert_mean(mask(0.5, 1) == mask(0.5, 1 + 2**32), 0.5)


def test_prefix_does_not_depend_on_the_length():
    long = mask(0.3)
    assert torch.equal(reference.keep_mask(torch.tensor([11]), (2, 3, 40, 70), 0.3)[0, 0],
                       long[0, 0, :40, :70])  # fmt: skip


def test_factor_belongs_to_the_rounded_probability():
    threshold, factor = dropout_rule(0.1)
    assert threshold == 6554
    assert factor == 65536 / (65536 - 6554)
    assert dropout_rule(1.0) == (65536, 0.0)


def test_output_keeps_its_expectation():
    q = torch.zeros(*SHAPE[:3], 1)
    k, v = torch.zeros(*SHAPE[:2], SHAPE[3], 1), torch.ones(*SHAPE[:2], SHAPE[3], 1)
    o = attention(q, k, v, dropout_p=0.25, backend="reference")
    sigma = (0.25 / 0.75 / (o.numel() * SHAPE[3])) ** 0.5
    assert abs(o.double().mean() - 1) < 4 * sigma


def test_philox_is_the_published_one():
    # Random123's known answer for philox4x32-7 with counter and key zero
    zero = torch.zeros(1, dtype=torch.int64)
    words = reference._philox(zero, (zero,) * 4)
    expected = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert tuple(int(w) for w in words) == expected
