"""Mixup and CutMix: pairing, weights, targets, and their distributions."""

import numpy as np
import pytest
import torch

from lsmha_fast.data import DatasetError, mixup_cutmix
from lsmha_fast.data.mix import cut_box, soft_targets

K = 7


def batch(B=6):
    images = torch.rand(B, 3, 8, 10, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(B) % K


def mix(seed, B=6, **options):
    images, labels = batch(B)
    return mixup_cutmix(images, labels, K, generator=torch.Generator().manual_seed(seed), **options)


def weight_of(targets, labels, smoothing=0.0):
    """Weight of each sample's own label where its partner's differs."""
    own = targets[torch.arange(len(labels)), labels]
    apart = labels != labels.flip(0)
    assert apart.any()
    off = smoothing / K
    weights = (own[apart] - off) / (1 - smoothing)
    assert torch.allclose(weights, weights[0].expand_as(weights), atol=1e-6)
    return float(weights[0])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_sum_to_one(seed, smoothing):
    _, targets = mix(seed, smoothing=smoothing)
    assert targets.dtype == torch.float32
    assert torch.allclose(targets.sum(1), torch.ones(6), atol=1e-6)
    assert targets.min() >= 0


@pytest.mark.parametrize("B", [1, 2, 5, 6])
@pytest.mark.parametrize("seed", range(10))
def test_mixup_is_the_weighted_mean_of_a_pair(seed, B):
    images, labels = batch(B)
    out, targets = mix(seed, B, cutmix_alpha=0.0, smoothing=0.0)
    if B == 1:
        assert torch.allclose(out, images)
        return
    w = weight_of(targets, labels)
    assert torch.allclose(out, w * images + (1 - w) * images.flip(0), atol=1e-6)


@pytest.mark.parametrize("seed", range(30))
def test_cutmix_weight_is_the_area_kept(seed):
    images, labels = batch()
    out, targets = mix(seed, mixup_alpha=0.0, smoothing=0.0)
    kept = (out == images).all(1)
    pasted = (out == images.flip(0)).all(1)
    assert (kept | pasted).all()
    assert torch.equal(kept[0], kept[3]), "one box for the whole batch"
    assert abs(weight_of(targets, labels) - float(kept[0].float().mean())) < 1e-6
    box = ~kept[0]
    assert box.sum() == box.any(1).sum() * box.any(0).sum(), "a rectangle"


def test_boxes_lie_inside_and_have_the_asked_area():
    rng = np.random.default_rng(0)
    whole = []
    for _ in range(2000):
        top, bottom, left, right = cut_box(32, 24, 0.75, rng)
        assert 0 <= top <= bottom <= 32
        assert 0 <= left <= right <= 24
        whole.append((bottom - top, right - left))
    assert max(whole) == (16, 12)
    assert {h for h, _ in whole} == set(range(8, 17))


def test_switch_and_probability():
    images, _ = batch()
    kinds = {"none": 0, "cutmix": 0, "mixup": 0}
    n = 2000
    for seed in range(n):
        out, _ = mix(seed, prob=0.6, switch_prob=0.3)
        pixels = (out == images) | (out == images.flip(0))
        same = torch.equal(out, images)
        kinds["none" if same else "cutmix" if pixels.all() else "mixup"] += 1
    # tiny CutMix boxes round to nothing and count as none: some 6 % of Beta(1, 1) draws
    assert abs(kinds["mixup"] / n - 0.6 * 0.7) < 0.06
    assert abs(kinds["cutmix"] / n - 0.6 * 0.3) < 0.06


def test_weights_follow_the_beta_distribution():
    labels = batch()[1]
    weights = np.array(
        [weight_of(mix(s, cutmix_alpha=0.0, smoothing=0.0)[1], labels) for s in range(2000)]
    )
    expected = np.random.default_rng(0).beta(0.8, 0.8, 200_000)
    quantiles = np.linspace(0.05, 0.95, 10)
    assert np.abs(np.quantile(weights, quantiles) - np.quantile(expected, quantiles)).max() < 0.05


def test_off_means_smoothed_labels_only():
    images, labels = batch()
    for options in ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0}, {"prob": 0.0}):
        out, targets = mix(0, smoothing=0.1, **options)
        assert torch.equal(out, images)
        assert torch.equal(targets, soft_targets(labels, K, 1.0, 0.1))
        assert torch.equal(targets.argmax(1), labels)
        assert torch.allclose(targets.min(), torch.tensor(0.1 / K))


def test_same_generator_same_result():
    for first, again in zip(mix(3), mix(3), strict=True):
        assert torch.equal(first, again)
    assert not torch.equal(mix(3)[0], mix(4)[0])


def test_global_generator_is_used_without_one():
    images, labels = batch()
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(mixup_cutmix(images, labels, K)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mixup_alpha": -1.0}, "mixup -1.0"),
        ({"cutmix_alpha": -1.0}, "cutmix -1.0"),
        ({"prob": 2.0}, r"prob must lie in \[0, 1\], got 2.0"),
        ({"smoothing": -0.5}, "smoothing must lie"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(DatasetError, match=message):
        mix(0, **options)


def test_bytes_are_refused():
    with pytest.raises(DatasetError, match=r"got torch.uint8: normalize first"):
        mixup_cutmix(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), K)
