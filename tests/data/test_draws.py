"""Draws by sample number: reproducible, and distributed as timm's."""

import math
import random

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from lsmha_fast.data import AugmentConfig, DatasetError
from lsmha_fast.data.device_batches import normal_levels
from lsmha_fast.data.draws import CODES, NAMES, draw_plan
from lsmha_fast.ops.augment import common as codes

N = 20_000
# a right test fails once in a thousand seeds, and these seeds are fixed
P = 1e-3
CONFIG = AugmentConfig(hflip=0.3)
# of seed 0, epoch 0, sample 0
EXPECTED_CROP = [[1, 3, 31, 27, 1, 1]]
EXPECTED_CODES = [3.0, 9.0]
EXPECTED_BOX = [[13, 4, 0, 26, 6183032298783847128]]


@pytest.fixture(scope="module")
def plan():
    return draw_plan(CONFIG, seed=5, epoch=2, index=torch.arange(N), H=32, W=32)


def p_of_counts(values, expected):
    """Chi-square of how often each value of `expected` (value -> probability) occurs."""
    counts = [int((values == value).sum()) for value in expected]
    assert sum(counts) == len(values), "a value that was not expected"
    return stats.chisquare(counts, [len(values) * p for p in expected.values()]).pvalue


def p_of_equal_laws(first, second):
    """Chi-square of two samples of hashable values; rare values are counted together."""
    values = sorted(set(first) | set(second))
    table = np.array([[list_.count(v) for v in values] for list_ in (first, second)])
    common = table.sum(0) >= 20
    rare = table[:, ~common].sum(1, keepdims=True)
    table = np.concatenate([table[:, common], rare], 1) if rare.sum() else table[:, common]
    return stats.chi2_contingency(table).pvalue


def test_operations_are_equally_likely_and_applied_half_the_time(plan):
    expected = {codes.NONE: 0.5}
    for code in CODES:
        expected[int(code)] = expected.get(int(code), 0.0) + 0.5 / len(NAMES)
    for layer in plan.layers.unbind(1):
        assert p_of_counts(layer[:, 0], expected) > P


def test_the_two_layers_are_independent(plan):
    table = np.zeros((12, 12))
    np.add.at(table, tuple(plan.layers[..., 0].long().numpy().T), 1)
    assert stats.chi2_contingency(table).pvalue > P


def matrices(plan, name):
    """(n, 6) of the affine layers of one operation."""
    rows = plan.layers.flatten(0, 1)
    rows = rows[rows[:, 0] == codes.AFFINE][:, 2:]
    a, b, c, d, e, f = rows.unbind(1)
    shapes = {
        "Rotate": (b != 0) & (d != 0),
        "ShearX": (b != 0) & (d == 0),
        "ShearY": (b == 0) & (d != 0),
        "TranslateXRel": (b == 0) & (d == 0) & (c != 0),
        "TranslateYRel": (b == 0) & (d == 0) & (f != 0),
    }
    return rows[shapes[name]]


LEVELS = {
    "Rotate": lambda m: -torch.atan2(m[:, 1], m[:, 0]) * 180 / math.pi / 30 * 10,
    "ShearX": lambda m: m[:, 1] / 0.3 * 10,
    "ShearY": lambda m: m[:, 3] / 0.3 * 10,
    "TranslateXRel": lambda m: m[:, 2] / 32 / 0.45 * 10,
    "TranslateYRel": lambda m: m[:, 5] / 32 / 0.45 * 10,
}


@pytest.mark.parametrize("name", LEVELS)
def test_magnitudes_are_normal_and_signs_fair(plan, name):
    signed = LEVELS[name](matrices(plan, name))
    assert len(signed) > 900
    assert p_of_counts(signed.sign(), {1.0: 0.5, -1.0: 0.5}) > P
    magnitude = signed.abs()
    assert float(magnitude.max()) <= 10 + 1e-9
    # below 10, where nothing is cut, the normal law
    below = magnitude[magnitude < 9.9]
    law = stats.truncnorm(-18, 1.8, loc=9, scale=0.5)
    assert stats.kstest(below.numpy(), law.cdf).pvalue > P
    assert p_of_counts(magnitude < 9.9, {True: stats.norm.cdf(1.8), False: stats.norm.sf(1.8)}) > P


def test_enhancing_factors_have_fair_signs(plan):
    rows = plan.layers.flatten(0, 1)
    rows = rows[(rows[:, 0] >= codes.COLOR) & (rows[:, 0] <= codes.SHARPNESS)]
    assert float(rows[:, 1].min()) >= 0.1
    assert float(rows[:, 1].max()) <= 1.9 + 1e-9
    assert p_of_counts(rows[:, 1] > 1, {True: 0.5, False: 0.5}) > P


def test_filters_and_flips(plan):
    assert p_of_counts(plan.crops[:, 4], {0: 0.5, 1: 0.5}) > P
    assert p_of_counts(plan.crops[:, 5], {0: 0.7, 1: 0.3}) > P
    affine = plan.layers.flatten(0, 1)
    affine = affine[affine[:, 0] == codes.AFFINE]
    assert p_of_counts(affine[:, 1], {0.0: 0.5, 1.0: 0.5}) > P


class Picture:
    """What timm's crop asks of a picture."""

    def __init__(self, H, W):
        self.size = (W, H)


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_crops_have_timms_sizes(size, monkeypatch):
    H, W = size
    monkeypatch.setattr("timm.data.transforms.F.get_image_size", lambda picture: picture.size)
    random.seed(3)
    draw = RandomResizedCropAndInterpolation.get_params
    theirs = [draw(Picture(H, W), CONFIG.scale, CONFIG.ratio)[2:] for _ in range(8000)]
    ours = draw_plan(CONFIG, 1, 0, torch.arange(8000), H, W).crops[:, 2:4].tolist()
    assert p_of_equal_laws(theirs, [tuple(v) for v in ours]) > P


def test_crop_positions_are_uniform(plan):
    height, width = plan.crops[:, 2], plan.crops[:, 3]
    for side, start in ((height, plan.crops[:, 0]), (width, plan.crops[:, 1])):
        for length in (28, 29, 30):
            found = start[side == length]
            places = 32 - length + 1
            assert len(found) > 500
            assert p_of_counts(found, dict.fromkeys(range(places), 1 / places)) > P


def test_erased_boxes_are_timms(plan):
    assert p_of_counts(plan.boxes[:, 2] > 0, {True: 0.25, False: 0.75}) > P
    random.seed(4)
    erasing = RandomErasing(1.0, mode="const", device="cpu")
    theirs = []
    for _ in range(4000):
        erased = erasing(torch.ones(1, 32, 32))[0] == 0
        rows, columns = erased.any(1).nonzero(), erased.any(0).nonzero()
        theirs.append((int(rows.min()), len(rows) // 4, len(columns) // 4))
    chosen = plan.boxes[plan.boxes[:, 2] > 0]
    ours = [(t, h // 4, w // 4) for t, _, h, w, _ in chosen.tolist()]
    assert p_of_equal_laws([v[1:] for v in theirs], [v[1:] for v in ours]) > P
    assert p_of_equal_laws([v[0] for v in theirs], [v[0] for v in ours]) > P


def test_noise_is_normal():
    levels = normal_levels().numpy()
    assert stats.kstest(levels, stats.norm.cdf).statistic < 1e-4
    assert abs(levels.std() - 1) < 1e-3


def test_a_row_follows_from_seed_epoch_and_number_alone(plan):
    some = torch.tensor([17, 4, 19_999, 4])
    again = draw_plan(CONFIG, 5, 2, some, 32, 32)
    for a, b in zip(plan, again, strict=True):
        assert torch.equal(a[some], b)
    for seed, epoch in ((6, 2), (5, 3)):
        other = draw_plan(CONFIG, seed, epoch, some, 32, 32)
        assert not torch.equal(other.crops, again.crops)
        assert not torch.equal(other.boxes, again.boxes)


def test_draws_stay_the_same_between_versions():
    row = draw_plan(AugmentConfig(), 0, 0, torch.tensor([0]), 32, 32)
    assert row.crops.tolist() == EXPECTED_CROP
    assert row.layers[0, :, 0].tolist() == EXPECTED_CODES
    assert row.boxes.tolist() == EXPECTED_BOX


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 200)])
def test_small_and_long_images_get_boxes_inside(size):
    H, W = size
    plan = draw_plan(AugmentConfig(erase_prob=1.0), 0, 0, torch.arange(500), H, W)
    for boxes in (plan.crops, plan.boxes):
        top, left, height, width = boxes[:, :4].unbind(1)
        assert bool(((top >= 0) & (left >= 0) & (top + height <= H) & (left + width <= W)).all())
    assert int(plan.crops[:, 2:4].min()) >= 1


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("rand-m9-mstd0.5-inc1", (9, 0.5, 2, 0.5)),
        ("rand-inc1-n3-m7-p0.8", (7, 0, 3, 0.8)),
        ("rand-inc1", (10, 0, 2, 0.5)),
    ],
)
def test_policies_are_read(text, numbers):
    assert AugmentConfig(auto_augment=text).rand_augment() == numbers


@pytest.mark.parametrize(
    "text",
    [
        "rand-m9",
        "rand-m9-inc0",
        "original-inc1",
        "rand-m11-inc1",
        "rand-m9-m8-inc1",
        "rand-x1-inc1",
    ],
)
def test_other_policies_are_refused(text):
    with pytest.raises(DatasetError, match=f"inc1 .*got '{text}'"):
        AugmentConfig(auto_augment=text)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hflip": 1.5}, r"hflip must lie in \[0, 1\], got 1.5"),
        ({"mixup": -1.0}, "mixup must be >= 0 and finite, got -1.0"),
        ({"scale": (0.9, 0.8)}, "scale must be 0 < low <= high <= 1.0, got 0.9, 0.8"),
        ({"interpolation": "area"}, "interpolation must be one of .* got 'area'"),
        ({"erase_mode": "rand"}, "erase_mode must be one of pixel, const, got 'rand'"),
        ({"crop_padding": -1}, "crop_padding must be >= 0, got -1"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(DatasetError, match=message):
        AugmentConfig(**options)
