"""Soft committees: sums by hand, every subset, paired comparison, one member on the device."""

import itertools
import math
import weakref

import pytest
import torch
from torch import nn

from lsmha_fast.analysis import soft_committee

K = 5


class Member(nn.Module):
    """Logits of its own for every image; an image is its number."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(self.logits[images.flatten()])


def planted(count, images=300, seed=0, skill=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(K, (images,), generator=generator)
    signal = skill * nn.functional.one_hot(labels, K)
    members = [Member(signal + torch.randn(images, K, generator=generator)) for _ in range(count)]
    numbers = torch.arange(images)
    return members, list(zip(numbers.split(70), labels.split(70), strict=True)), labels


@pytest.mark.parametrize("combination", ["logit", "probability"])
def test_every_subset_is_measured(combination):
    members, batches, labels = planted(4)
    result = soft_committee(members, batches)
    parts = [m.logits.detach().double() for m in members]
    if combination == "probability":
        parts = [p.softmax(1) for p in parts]
    assert [s.size for s in result.sizes[combination]] == [1, 2, 3, 4]
    for entry in result.sizes[combination]:
        accuracies = [
            float((torch.stack(pick).mean(0).argmax(1) == labels).double().mean())
            for pick in itertools.combinations(parts, entry.size)
        ]
        assert entry.kind == "all"
        assert entry.subsets == entry.measured == math.comb(4, entry.size)
        assert (entry.lowest, entry.highest) == (min(accuracies), max(accuracies))
        assert entry.mean == pytest.approx(sum(accuracies) / len(accuracies))
    assert list(result.members) == pytest.approx(
        [float((p.argmax(1) == labels).double().mean()) for p in parts]
    )


def test_logits_and_probabilities_are_different_committees():
    sure = torch.tensor([[0.0, 9.0, -99.0]])  # logits: 9 + 0; probabilities: 1 + 0.1
    unsure = torch.tensor([[9.5, 0.0, -99.0]])
    batches = [(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))]
    third = torch.tensor([[0.0, 0.2, -99.0]])
    result = soft_committee([Member(sure), Member(unsure), Member(third)], batches)
    logit, probability = (result.sizes[c][-1].mean for c in ("logit", "probability"))
    assert (logit, probability) == (1, 0)


def test_independent_members_help_and_copies_do_not():
    members, batches, _ = planted(5, images=1000)
    independent = soft_committee(members, batches).comparisons["logit"][1]
    assert independent.what.startswith("all 5 - best member (")
    assert independent.low > 0.05
    assert independent.p_value == pytest.approx(2 / 2001)
    copies = soft_committee([members[0]] * 5, batches).comparisons["logit"][1]
    assert (copies.difference, copies.low, copies.high, copies.p_value) == (0, 0, 0, 1)


def test_kinds_are_told_apart():
    members, batches, _ = planted(5)
    groups = ["a", "a", "b", "b", "c"]
    sizes = soft_committee(members, batches, groups=groups).sizes["logit"]
    found = {(s.size, s.kind): s.subsets for s in sizes}
    assert found == {
        (1, "all"): 5, (2, "all"): 10, (2, "distinct"): 8, (2, "equal"): 2, (3, "all"): 10,
        (3, "distinct"): 4, (4, "all"): 5, (5, "all"): 1,
    }  # fmt: skip


def test_architectures_that_differ_beat_seeds_that_agree():
    """Seeds of one architecture make the same mistakes here, architectures do not."""
    members, batches, _ = planted(3, images=800)
    twice = [m for m in members for _ in range(2)]
    result = soft_committee(twice, batches, groups=["a", "a", "b", "b", "c", "c"])
    comparison, gain = result.comparisons["logit"][-2:]
    assert comparison.what == "2 architectures - 2 seeds of one"
    distinct, equal = (
        next(s for s in result.sizes["logit"] if (s.size, s.kind) == (2, kind))
        for kind in ("distinct", "equal")
    )
    assert comparison.difference == pytest.approx(distinct.mean - equal.mean)
    assert 0 < comparison.low <= comparison.difference <= comparison.high
    # both kinds hold every member equally often, so what joining adds differs by the same
    assert gain.what.endswith("each over its own members")
    assert gain.difference == pytest.approx(comparison.difference)


def test_gain_does_not_reward_better_members():
    """Copies gain nothing from each other, however weak: only the plain difference blames them."""
    members, batches, labels = planted(1, images=400)
    good = members[0]
    bad = Member(torch.randn(400, K, generator=torch.Generator().manual_seed(9)))
    other = Member(good.logits.detach() * 2)
    result = soft_committee([bad, bad, good, other], batches, groups=["a", "a", "b", "c"])
    plain, gain = result.comparisons["logit"][2:4]
    own = {m: float((m.logits.argmax(1) == labels).double().mean()) for m in (good, bad)}
    pairs = [(bad, good), (bad, good), (bad, other), (bad, other), (good, other)]
    joined = [float((sum(m.logits for m in p).argmax(1) == labels).double().mean()) for p in pairs]
    assert plain.difference == pytest.approx(sum(joined) / 5 - own[bad])
    expected = sum(joined) / 5 - (4 * own[bad] + 6 * own[good]) / 10
    assert gain.difference == pytest.approx(expected)
    assert gain.difference < plain.difference


def test_interval_is_that_of_paired_differences():
    members, batches, labels = planted(2, images=2000)
    result = soft_committee(members, batches, samples=4000).comparisons["logit"][0]
    right = [(m.logits.argmax(1) == labels).double() for m in members]
    whole = (sum(m.logits for m in members).argmax(1) == labels).double()
    difference = whole - sum(right) / 2
    error = float(difference.std()) / 2000**0.5
    assert result.difference == pytest.approx(float(difference.mean()))
    assert result.high - result.low == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_many_subsets_are_drawn_and_the_seed_decides():
    members, batches, _ = planted(6, images=60)
    first, again, other = (
        soft_committee(members, batches, max_subsets=5, samples=50, seed=s) for s in (1, 1, 2)
    )
    assert first == again != other
    entry = first.sizes["logit"][2]
    assert (entry.subsets, entry.measured) == (20, 5)


def test_only_one_member_exists_at_a_time():
    members, batches, _ = planted(3)
    logits = [m.logits.detach() for m in members]
    made = []

    def stream():
        for own in logits:
            assert all(earlier() is None for earlier in made)
            member = Member(own)
            made.append(weakref.ref(member))
            yield member
            del member

    assert soft_committee(stream(), batches) == soft_committee(members, batches)
    assert len(made) == 3


def test_members_run_in_evaluation_mode_and_keep_their_own():
    members, batches, _ = planted(2)
    training = soft_committee([m.train() for m in members], batches)
    assert all(m.training and m.dropout.training for m in members)
    assert training == soft_committee([m.eval() for m in members], batches)
    assert not any(m.training for m in members)


def test_bad_input_is_an_error():
    members, batches, _ = planted(2)
    with pytest.raises(ValueError, match="at least two members.* got 1 members"):
        soft_committee(members[:1], batches)
    with pytest.raises(ValueError, match="3 names and 2 groups"):
        soft_committee(members, batches, names="abc", groups="ab")
    with pytest.raises(ValueError, match="at most 20 members, got 21"):
        soft_committee([members[0]] * 21, batches)
    with pytest.raises(ValueError, match="logits of member 2 are not finite"):
        soft_committee([members[0], Member(torch.full((300, K), torch.nan))], batches)
    with pytest.raises(ValueError, match="member 2 has 4 classes, member 1 has 5"):
        soft_committee([members[0], Member(torch.zeros(300, 4))], batches)
    with pytest.raises(ValueError, match=r"labels 0\.\.9 do not fit 5 classes"):
        soft_committee(members, [(torch.arange(2), torch.tensor([0, 9]))])
    with pytest.raises(ValueError, match="no batches"):
        soft_committee(members, [])
    with pytest.raises(ValueError, match="one-way iterator"):
        soft_committee(members, iter(batches))
    with pytest.raises(ValueError, match="level=2"):
        soft_committee(members, batches, level=2)
