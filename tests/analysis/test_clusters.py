"""Clusters against their definition, planted clusters, and relabelling."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsmha_fast.analysis import find_clusters


@st.composite
def planted(draw):
    """(K, clusters, fields above threshold that are noise, by kind) without accidental cliques."""
    K = draw(st.integers(2, 12))
    labels = draw(st.permutations(range(K)))
    sizes = draw(st.lists(st.integers(1, 4), max_size=5))
    clusters, start = [], 0
    for size in sizes:
        if start + size <= K:
            clusters.append(frozenset(labels[start : start + size]))
            start += size
    home = {label: c for c in clusters for label in c}
    noise = {"internal": set(), "column": set(), "rest": set()}
    pairs = st.tuples(st.integers(0, K - 1), st.integers(0, K - 1))
    for i, j in draw(st.lists(pairs, max_size=20)):
        if i in home and j in home:
            # one direction only: both would be a partnership
            if home[i] != home[j] and (j, i) not in noise["internal"]:
                noise["internal"].add((i, j))
        elif j in home:
            noise["column"].add((i, j))
        elif i != j:  # a label's own field would make it a unit cluster
            noise["rest"].add((i, j))
    return K, clusters, noise


def planted_matrix(K, clusters, noise):
    matrix = torch.full((K, K), 0.1)
    for cluster in clusters:
        for i in cluster:
            for j in cluster:
                matrix[i, j] = 0.8
    for i, j in set().union(*noise.values()):
        matrix[i, j] = 0.7
    # the largest field, so that "above" means the same for every draw
    matrix[0, 0] = 1.0 if any(0 in c for c in clusters) else matrix[0, 0]
    return matrix


@settings(max_examples=150, deadline=None)
@given(planted())
def test_planted_clusters_and_noise_are_recovered(plan):
    K, clusters, noise = plan
    matrix = planted_matrix(*plan)
    if not clusters and not noise["rest"]:
        matrix = -matrix  # nothing positive: nothing recognised
    found = find_clusters(matrix[None], threshold=0.5)
    assert {frozenset(c) for c in found.labels(0)} == set(clusters)
    U = sum(map(len, clusters))
    assert found.number.tolist() == [len(clusters)]
    assert found.mean_size.tolist() == [pytest.approx(U / max(len(clusters), 1))]
    assert found.internal_noise.tolist() == [len(noise["internal"])]
    assert found.column_noise.tolist() == [len(noise["column"])]
    assert found.rest_noise.tolist() == [len(noise["rest"])]
    external = len(noise["column"]) + len(noise["rest"])
    assert found.external_noise.tolist() == [external]
    assert found.density.tolist() == [pytest.approx(external / max(K * K - U * U, 1))]
    inside = [label for c in found.labels(0) for label in c]
    assert found.order[0, :U].tolist() == inside
    assert sorted(found.order[0].tolist()) == list(range(K))


@st.composite
def distinct_fields(draw):
    """(H, K, K) matrices without equal fields, and a permutation of their labels."""
    H, K = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    matrices = torch.randperm(H * K * K, generator=generator).view(H, K, K).double()
    matrices = matrices - draw(st.integers(0, H * K * K))
    return matrices, torch.tensor(draw(st.permutations(range(K))))


@settings(max_examples=150, deadline=None)
@given(distinct_fields(), st.sampled_from([0.2, 0.5, 0.9]), st.sampled_from(["matrix", "row"]))
def test_relabelling_permutes_the_answer_and_nothing_else(drawn, threshold, normalize):
    matrices, p = drawn
    found = find_clusters(matrices, threshold=threshold, normalize=normalize)
    moved = find_clusters(matrices[:, p][:, :, p], threshold=threshold, normalize=normalize)
    assert torch.equal(moved.assignment, found.assignment[:, p])
    assert torch.equal(moved.above, found.above[:, p][:, :, p])
    for name in ("number", "mean_size", "internal_noise", "column_noise", "rest_noise", "density"):
        assert torch.equal(getattr(moved, name), getattr(found, name))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.sampled_from(["matrix", "row"]))
def test_definition_holds_on_any_matrix(seed, K, normalize):
    """Few distinct values, so that ties are common: against plain loops."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(-2, 5, (K, K), generator=generator).double()
    found = find_clusters(matrix[None], threshold=0.5, normalize=normalize)
    m = matrix.tolist()
    top = max(map(max, m))
    scale = [top if normalize == "matrix" else max(row) for row in m]
    above = [[m[i][j] > 0 and m[i][j] >= 0.5 * scale[i] for j in range(K)] for i in range(K)]
    assert found.above[0].tolist() == above
    clusters = found.labels(0)
    home = {label: n for n, c in enumerate(clusters) for label in c}
    assert set(home) == {i for i in range(K) if above[i][i]}
    assert all(above[i][j] for c in clusters for i in c for j in c)
    # no two clusters could be one
    for n, c in enumerate(clusters):
        for d in clusters[n + 1 :]:
            assert not all(above[i][j] and above[j][i] for i in c for j in d)
    counts = {"internal": 0, "column": 0, "rest": 0}
    for i in range(K):
        for j in range(K):
            if above[i][j] and j not in home:
                counts["rest"] += 1
            elif above[i][j] and i not in home:
                counts["column"] += 1
            elif above[i][j] and home[i] != home[j]:
                counts["internal"] += 1
    assert found.internal_noise.item() == counts["internal"]
    assert found.column_noise.item() == counts["column"]
    assert found.rest_noise.item() == counts["rest"]


def plain_cover(above, own):
    """The documented greedy rule, one label at a time: sets of labels in the order found."""
    K = len(own)
    partners = [{j for j in range(K) if above[i][j] and above[j][i]} for i in range(K)]
    free, cover = {i for i in range(K) if above[i][i]}, []
    while free:
        clique, fit = [], set(free)
        while fit:
            clique.append(max(fit, key=lambda i: (len(partners[i] & fit), own[i], -i)))
            fit = (fit & partners[clique[-1]]) - {clique[-1]}
        cover.append(set(clique))
        free -= cover[-1]
    return cover


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 14), st.floats(0.05, 1.0))
def test_cover_is_the_documented_greedy_one(seed, K, threshold):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(-1, 9, (K, K), generator=generator).double() + 3 * torch.eye(K)
    found = find_clusters(matrix[None], threshold=threshold)
    cover = plain_cover(found.above[0].tolist(), matrix.diagonal().tolist())
    assignment = found.assignment[0].tolist()
    numbers = range(int(found.number))
    assert [{j for j in range(K) if assignment[j] == n} for n in numbers] == cover


@pytest.mark.parametrize("own", [0.0, 5.0])
def test_large_networks_take_seconds(own):
    """7 blocks of 256 heads and 100 labels, few partners and many: under 5 s of one core."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.rand(256, 100, 100, generator=generator) for _ in range(7)]
    start = time.process_time()
    for block in blocks:
        find_clusters(block + own * torch.eye(100))
    assert time.process_time() - start < 5


def test_ties_are_broken_as_documented():
    # a path 0 - 1 - 2: label 1 has most partners; of 0 and 2, label 2 has the larger own field
    path = torch.tensor([[0.6, 0.6, 0.0], [0.6, 0.6, 0.6], [0.0, 0.6, 1.0]])
    assert find_clusters(path[None]).labels(0) == [[1, 2], [0]]
    # with equal fields the first label wins
    path[2, 2] = 0.6
    assert find_clusters(path[None]).labels(0) == [[0, 1], [2]]


def test_heads_do_not_see_each_other():
    matrices = torch.rand(6, 9, 9)
    together = find_clusters(matrices)
    for head in range(6):
        assert torch.equal(find_clusters(matrices[head : head + 1]).order[0], together.order[head])


@pytest.mark.parametrize("fill", [0.0, -1.0])
def test_head_without_a_positive_field_recognises_nothing(fill):
    found = find_clusters(torch.full((1, 3, 3), fill))
    assert found.labels(0) == []
    assert found.number.item() == found.external_noise.item() == 0
    assert found.mean_size.item() == found.density.item() == 0


def test_bad_input_is_an_error():
    with pytest.raises(ValueError, match=r"\(H, K, K\), got \(3, 3\)"):
        find_clusters(torch.ones(3, 3))
    with pytest.raises(ValueError, match="not finite"):
        find_clusters(torch.full((1, 2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\], got 1.5"):
        find_clusters(torch.ones(1, 2, 2), threshold=1.5)
    with pytest.raises(ValueError, match="unknown normalisation 'column'; choose from matrix, row"):
        find_clusters(torch.ones(1, 2, 2), normalize="column")
