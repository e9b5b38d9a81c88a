"""Bootstrap intervals: against plain resampling, of known width, the same for the same seed."""

import numpy as np
import pytest
import torch

from lsmha_fast.analysis import bootstrap_snr, find_clusters, signal_to_noise


def noisy_heads(H=12, K=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    own = torch.eye(K) * torch.rand(H, K, 1, generator=generator)
    return own + 0.8 * torch.rand(H, K, K, generator=generator)


def test_equals_measuring_resampled_blocks():
    matrices = noisy_heads()
    found = find_clusters(matrices)
    intervals = bootstrap_snr(matrices, found, samples=50, level=0.8, seed=5)
    weights = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), size=50)
    snrs = []
    for row in weights:
        heads = matrices[np.repeat(np.arange(12), row)]
        snrs.append(signal_to_noise(heads, find_clusters(heads)))
    low, high = 5 - 1, 45 - 1  # 10 % and 90 % of 50 ordered values
    for name in ("mean_snr", "mean_unclipped"):
        ordered = sorted(getattr(s, name) for s in snrs)
        assert getattr(intervals, name) == pytest.approx((ordered[low], ordered[high]), rel=1e-9)
    for name in ("snr", "unclipped"):
        ordered = torch.stack([getattr(s, name) for s in snrs]).sort(0).values
        expected = torch.stack([ordered[low], ordered[high]], -1)
        torch.testing.assert_close(getattr(intervals, name), expected, rtol=1e-9, atol=0)


def test_interval_holds_the_measured_ratio_and_narrows_with_heads():
    widths = []
    for H in (10, 160):
        matrices = noisy_heads(H, 10)
        found = find_clusters(matrices)
        snr = signal_to_noise(matrices, found)
        low, high = bootstrap_snr(matrices, found).mean_snr
        assert low < snr.mean_snr < high
        widths.append((high - low) / snr.mean_snr)
    assert widths[1] < widths[0] / 2


def test_seed_decides():
    matrices = noisy_heads()
    found = find_clusters(matrices)
    first, again, other = (bootstrap_snr(matrices, found, seed=s) for s in (1, 1, 2))
    assert first.mean_unclipped == again.mean_unclipped != other.mean_unclipped
    assert torch.equal(first.snr, again.snr)


def test_single_head_has_a_point_and_no_noise_is_infinite():
    matrices = torch.eye(3)[None]
    found = find_clusters(matrices)
    intervals = bootstrap_snr(matrices, found, samples=20)
    assert intervals.mean_snr == (float("inf"), float("inf"))
    assert (intervals.snr == float("inf")).all()
    zeros = torch.zeros(4, 3, 3)
    nothing = bootstrap_snr(zeros, find_clusters(zeros), samples=20)
    assert nothing.mean_snr == nothing.mean_unclipped == (0, 0)


def test_bad_input_is_an_error():
    matrices = noisy_heads()
    found = find_clusters(matrices)
    with pytest.raises(ValueError, match="samples=0"):
        bootstrap_snr(matrices, found, samples=0)
    with pytest.raises(ValueError, match="level=1"):
        bootstrap_snr(matrices, found, level=1)
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_snr(matrices * torch.nan, found)
    with pytest.raises(ValueError, match="their clusters"):
        bootstrap_snr(matrices[:3], found)
