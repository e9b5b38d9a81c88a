"""Signal-to-noise ratios by hand."""

import math

import pytest
import torch

from lsmha_fast.analysis import find_clusters, signal_to_noise

# head 1: cluster {0, 1}, noise at (2, 0); head 2: clusters {0} and {2}, noise at (0, 2)
HEADS = torch.tensor(
    [
        [[1.0, 0.8, 0.0], [0.6, 0.9, 0.0], [0.7, 0.0, 0.2]],
        [[1.0, 0.0, 0.6], [0.0, 0.1, 0.0], [0.0, 0.0, 0.8]],
    ]
)


def test_three_labels_by_hand():
    result = signal_to_noise(HEADS, find_clusters(HEADS))
    assert result.signal.tolist() == [2, 1, 1]
    assert result.noise.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert result.snr.tolist() == [4, math.inf, 2]
    assert result.mean_signal == pytest.approx(4 / 3)
    assert result.mean_noise == pytest.approx(2 / 6)
    assert result.mean_snr == pytest.approx(4)
    # summed fields: rows (2, .8, .6), (.6, 1, 0), (.7, 0, 1); a pair deviates by half its distance
    assert result.unclipped.tolist() == pytest.approx([2 / 0.1, 1 / 0.3, 1 / 0.35], rel=1e-5)
    assert result.mean_unclipped == pytest.approx(sum([20, 1 / 0.3, 1 / 0.35]) / 3, rel=1e-5)


def test_means_follow_from_the_clusters():
    """<S> = H N_c C_s / K and, with unit clusters, <n> = H (n_i + n_e) / (K (K - 1))."""
    H, K = 5, 7
    own = torch.eye(K).repeat(H, 1, 1) * torch.linspace(0.3, 1, H)[:, None, None]
    noise = torch.rand(H, K, K).triu(1) * own.amax((1, 2))[:, None, None]  # no partnerships
    found = find_clusters(own + noise)
    result = signal_to_noise(own + noise, found)
    assert (found.mean_size == 1).all()
    assert result.mean_signal == pytest.approx(float(found.recognized.sum()) / K)
    count = found.internal_noise.sum() + found.external_noise.sum()
    assert result.mean_noise == pytest.approx(float(count) / (K * (K - 1)))
    assert result.mean_snr == pytest.approx(result.mean_signal / result.mean_noise)


def test_nothing_recognised_has_no_signal():
    zeros = torch.zeros(2, 3, 3)
    result = signal_to_noise(zeros, find_clusters(zeros))
    assert result.mean_snr == 0
    assert (result.snr == 0).all()
    assert (result.unclipped == 0).all()


def test_wrong_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"got \(1, 3, 3\) and clusters of \(2, 3, 3\)"):
        signal_to_noise(HEADS[:1], find_clusters(HEADS))
    one = torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match="K >= 2"):
        signal_to_noise(one, find_clusters(one))
