"""Order of the heads: covers hold, orders are nested, labels have no names, controls are fair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsmha_fast import create_model
from lsmha_fast.analysis import (
    count_macs,
    find_clusters,
    head_magnitudes,
    largest_heads,
    random_heads,
    rank_heads,
)


def ranked(matrices):
    return rank_heads(matrices, [find_clusters(m) for m in matrices])


@st.composite
def networks(draw):
    """Blocks of (H, K, K) without equal fields."""
    K = draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    blocks = []
    for H in sizes:
        fields = torch.rand(H, K, K, generator=generator, dtype=torch.float64)
        diagonal = torch.rand(H, K, generator=generator).double() * draw(st.sampled_from([0.0, 3]))
        blocks.append(fields - draw(st.sampled_from([0.0, 0.7])) + torch.diag_embed(diagonal))
    return blocks


@settings(max_examples=100, deadline=None)
@given(networks(), st.integers(1, 3))
def test_what_is_redundant_is_covered(blocks, keep_per_label):
    ranking = ranked(blocks)
    number = ranking.redundant(keep_per_label)
    kept = ranking.kept(number)
    assert ranking.uncovered(kept, keep_per_label) == 0
    for block, heads in zip(blocks, kept, strict=True):
        recognized = find_clusters(block).recognized
        before, after = recognized.sum(0), recognized[list(heads)].sum(0)
        assert (after >= before.clamp(max=keep_per_label)).all()
    # the next head that goes was needed by the rounds that must stay
    if number < len(ranking.removal):
        block, head = ranking.removal[number]
        assert 1 <= ranking.rounds[block][head] <= keep_per_label


@settings(max_examples=60, deadline=None)
@given(networks())
def test_every_beginning_is_a_pruning(blocks):
    ranking = ranked(blocks)
    H = sum(map(len, blocks))
    assert len(set(ranking.removal)) == len(ranking.removal) == H - len(blocks)
    for number in range(len(ranking.removal) + 1):
        kept = ranking.kept(number)
        assert sum(map(len, kept)) == H - number
        assert all(kept)
        if number:
            assert all(set(k) <= set(e) for k, e in zip(kept, earlier, strict=True))  # noqa: F821
        earlier = kept  # noqa: F841


@settings(max_examples=60, deadline=None)
@given(networks(), st.randoms())
def test_labels_have_no_names(blocks, random):
    order = list(range(blocks[0].shape[1]))
    random.shuffle(order)
    moved = [m[:, order][:, :, order] for m in blocks]
    assert ranked(moved).removal == ranked(blocks).removal


def head_of(*labels, K=6, peak=1.0):
    """A head whose unit clusters are `labels`."""
    matrix = torch.zeros(K, K)
    for label in labels:
        matrix[label, label] = peak
    return matrix


def test_planted_cover():
    """Heads 0 and 1 say what 2, 3 and 4 say; 5 is silent; 6 repeats 0 with weaker fields."""
    weaker = head_of(0, 1, 2)
    weaker[1, 1] = 0.9
    block = torch.stack(
        [head_of(0, 1, 2), head_of(3, 4), head_of(0), head_of(4), head_of(3), head_of(), weaker]
    )
    ranking = ranked([block])
    assert ranking.rounds[0].tolist() == [1, 1, 3, 2, 2, 0, 2]
    assert ranking.redundant() == 5
    assert ranking.kept(5) == ((0, 1),)
    # silent first; then third round; of the second round those taken for fewer labels
    assert [h for _, h in ranking.removal] == [5, 2, 4, 3, 6, 1]
    assert ranking.redundant(2) == 2
    assert ranking.uncovered(ranking.kept(6)) == 2  # labels 3 and 4


def test_block_that_recognises_nothing_keeps_its_strongest_head():
    block = torch.zeros(3, 2, 2)
    block[0, 0, 1], block[1, 0, 1], block[2, 0, 1] = 1.0, 3.0, 2.0
    ranking = ranked([block])
    assert ranking.removal == ((0, 0), (0, 2))
    assert ranking.kept(ranking.redundant()) == ((1,),)


def test_bad_input_is_an_error():
    block = torch.rand(3, 4, 4)
    with pytest.raises(ValueError, match="2 blocks of matrices, 1 of clusters"):
        rank_heads([block, block], [find_clusters(block)])
    with pytest.raises(ValueError, match="block 1: matrices"):
        rank_heads([block[:2]], [find_clusters(block)])
    for number in (-1, 3):
        with pytest.raises(ValueError, match=f"0 to 2 heads can be removed.*got {number}"):
            ranked([block]).kept(number)


def test_controls_keep_as_many_heads_per_block():
    sizes, counts = (9, 4), (5, 1)
    some = random_heads(sizes, counts, seed=3)
    assert [len(k) for k in some] == [5, 1]
    assert some == random_heads(sizes, counts, seed=3)
    assert some != random_heads(sizes, counts, seed=4)
    fewer = random_heads(sizes, (2, 1), seed=3)
    assert all(set(k) <= set(e) for k, e in zip(fewer, some, strict=True))
    assert largest_heads([torch.tensor([1.0, 3, 3, 2])], [2]) == ((1, 2),)


def test_magnitude_is_the_norm_of_a_heads_own_weights():
    model = create_model("cct_2_3x2_32", 10, 16)
    attn = model.blocks[1].self_attn
    with torch.no_grad():
        attn.out_proj.weight.zero_()
        attn.in_proj_weight.zero_()
        attn.in_proj_weight[2 * 128 + 5 * 8 + 1, 3] = 3.0  # v of head 5
        attn.out_proj.weight[7, 5 * 8] = 4.0
    magnitudes = head_magnitudes(model)
    assert magnitudes[1].tolist() == [5.0 if h == 5 else 0.0 for h in range(16)]
    assert len(magnitudes[0]) == 16


def test_macs_are_those_counted_by_hand():
    """cct_7_3x1_32: 1,181,639,680 with both products of attention, whatever the heads."""
    model = create_model("cct_7_3x1_32", 100, 64)
    assert count_macs(model, torch.zeros(1, 3, 32, 32)) == 1_181_639_680
    assert model.training
