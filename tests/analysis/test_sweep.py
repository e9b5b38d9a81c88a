"""The threshold sweep: the same numbers as one threshold at a time, for people and for JSON."""

import json

import pytest
import torch

from lsmha_fast.analysis import find_clusters, signal_to_noise, sweep_threshold
from lsmha_fast.analysis.summary import block_numbers


@pytest.mark.parametrize("normalize", ["matrix", "row"])
def test_every_threshold_is_measured_alone(normalize):
    matrices = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(1))
    sweep = sweep_threshold(matrices, (0.3, 0.8), normalize=normalize)
    for threshold, numbers in zip((0.3, 0.8), sweep.numbers, strict=True):
        found = find_clusters(matrices, threshold=threshold, normalize=normalize)
        assert numbers == block_numbers(found, signal_to_noise(matrices, found))
    assert sweep.numbers[0] != sweep.numbers[1]


def test_elements_above_threshold_only_become_fewer():
    matrices = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(2))
    numbers = sweep_threshold(matrices).numbers
    labels = [n["heads_per_label"] for n in numbers]
    assert labels == sorted(labels, reverse=True)
    assert labels[0] > labels[-1] > 0


def test_table_and_record():
    sweep = sweep_threshold(torch.eye(3)[None] + 0.25, (0.2, 0.5))
    record = json.loads(json.dumps(sweep.record(), allow_nan=False))
    assert record["thresholds"] == [0.2, 0.5]
    assert record["clusters"] == [1, 3]  # all fields reach 0.2 of the largest: one cluster
    assert record["cluster_size"] == [3, 1]
    assert record["snr"] == [None, None]  # signal without noise
    title, low, high = sweep.lines()
    assert title.split() == ["threshold", "N_c", "C_s", "n_i", "n_e", "SNR"]
    assert low.split() == ["0.2", "1.00", "3.00", "0.00", "0.00", "inf"]
    assert high.split() == ["0.5", "3.00", "1.00", "0.00", "0.00", "inf"]


def test_bad_input_is_an_error():
    with pytest.raises(ValueError, match="no thresholds"):
        sweep_threshold(torch.ones(1, 2, 2), ())
    with pytest.raises(ValueError, match="got 0"):
        sweep_threshold(torch.ones(1, 2, 2), (0.5, 0))
