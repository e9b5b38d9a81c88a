"""Symmetry breaking on planted blocks; heads matched over seeds; assignment by brute force."""

import itertools
import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsmha_fast.analysis import find_clusters, head_stability, symmetry_breaking
from lsmha_fast.analysis._assignment import best_assignment
from lsmha_fast.analysis.symmetry import stability_over_seeds, symmetry_lines, symmetry_record


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
def test_assignment_is_the_best_of_all(R, C, seed, ties):
    random = np.random.default_rng(seed)
    gain = random.integers(-3, 4, (R, C)) if ties else random.normal(size=(R, C))
    rows, columns = best_assignment(gain)
    n = min(R, C)
    assert len(rows) == len(set(rows)) == len(set(columns)) == n
    assert rows.tolist() == sorted(rows)
    small, wide = (gain, C) if R <= C else (gain.T, R)
    best = max(
        sum(small[i, p] for i, p in enumerate(pick))
        for pick in itertools.permutations(range(wide), n)
    )
    assert gain[rows, columns].sum() == pytest.approx(best)


def test_assignment_of_many_heads_takes_seconds_and_agrees_with_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    gain = np.random.default_rng(0).random((200, 256))
    start = time.process_time()
    pairs = best_assignment(gain)
    assert time.process_time() - start < 5
    expected = optimize.linear_sum_assignment(gain, maximize=True)
    assert gain[pairs].sum() == pytest.approx(gain[expected].sum(), rel=1e-12)


def shared_out(H=4, K=8):
    """Every head has its own K / H labels, in one block of unit clusters."""
    own = torch.zeros(H, K)
    for j in range(K):
        own[j % H, j] = 1.0
    return torch.diag_embed(own)


def test_labels_that_are_shared_out():
    matrices = shared_out()
    found = symmetry_breaking(matrices, find_clusters(matrices))
    assert found.label_by_head.shape == (8, 4)
    assert found.label_by_head.sum() == 8
    assert found.label_by_head[5].tolist() == [0, 1, 0, 0]
    assert found.head_entropy.tolist() == pytest.approx([1 / 3] * 4)  # log 2 / log 8
    assert found.label_entropy.tolist() == [0] * 8
    assert torch.equal(found.overlap, torch.eye(4, dtype=torch.float64))
    assert found.mean_overlap == 0 < found.chance_overlap
    assert found.heads_per_label.tolist() == [1] * 8
    assert (found.silent_heads, found.lost_labels) == (0, 0)


def test_heads_that_all_do_the_same():
    matrices = torch.eye(6).repeat(3, 1, 1)
    found = symmetry_breaking(matrices, find_clusters(matrices))
    assert found.mean_overlap == found.chance_overlap == 1
    assert found.head_entropy.tolist() == pytest.approx([1] * 3)
    assert found.label_entropy.tolist() == pytest.approx([1] * 6)


def test_nothing_recognised_is_neutral():
    matrices = torch.zeros(2, 3, 3)
    found = symmetry_breaking(matrices, find_clusters(matrices))
    assert (found.silent_heads, found.lost_labels, found.mean_overlap) == (2, 3, 0)
    assert found.head_entropy.tolist() == [0, 0]
    json.dumps(symmetry_record(found), allow_nan=False)
    assert "2 heads recognise nothing, 3 labels have no head" in symmetry_lines(found)[0]


def test_chance_overlap_is_that_of_random_sets():
    """Two heads with 3 of 10 labels: the mean Jaccard index over all pairs of such sets."""
    own = torch.zeros(2, 10)
    own[0, :3] = own[1, 4:7] = 1
    matrices = torch.diag_embed(own)
    found = symmetry_breaking(matrices, find_clusters(matrices), draws=2000)
    sets = list(itertools.combinations(range(10), 3))
    exact = np.mean([len({0, 1, 2} & set(s)) / len({0, 1, 2} | set(s)) for s in sets])
    assert found.chance_overlap == pytest.approx(exact, abs=0.01)


def test_permuted_heads_are_found_again():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(7, 9, 9, generator=generator) ** 4
    order = torch.randperm(7, generator=generator)
    stability = head_stability(first, first[order])
    assert stability.mean_similarity == pytest.approx(1)
    assert torch.equal(order[stability.match[:, 1]], stability.match[:, 0])
    assert stability.chance < 0.95


def test_unrelated_heads_match_no_better_than_chance():
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.rand(20, 30, 30, generator=generator) ** 4 for _ in range(2))
    stability = head_stability(first, second)
    assert stability.mean_similarity == pytest.approx(stability.chance, abs=0.03)
    pairs = stability_over_seeds([first, second, first])
    assert [(a, b) for a, b, _ in pairs] == [(0, 1), (0, 2), (1, 2)]
    assert pairs[1][2].mean_similarity == pytest.approx(1)


def test_different_numbers_of_heads_are_matched_as_far_as_they_go():
    first = torch.rand(3, 5, 5)
    stability = head_stability(first, torch.cat([torch.rand(2, 5, 5) * 0.1, first]))
    assert stability.match[:, 0].tolist() == [0, 1, 2]
    assert stability.similarity.shape == (3,)


def test_bad_input_is_an_error():
    with pytest.raises(ValueError, match="4 and 3 labels"):
        head_stability(torch.rand(2, 4, 4), torch.rand(2, 3, 3))
    with pytest.raises(ValueError, match="not finite"):
        head_stability(torch.full((1, 2, 2), torch.nan), torch.rand(1, 2, 2))
    with pytest.raises(ValueError, match="their clusters"):
        symmetry_breaking(torch.rand(2, 4, 4), find_clusters(torch.rand(3, 4, 4)))
