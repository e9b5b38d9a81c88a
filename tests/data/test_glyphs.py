"""Generated images are the same everywhere, for any subset; the test faces are never trained on."""

import time

import numpy as np
import pytest
import torch

from lsmha_fast import data
from lsmha_fast.data import DatasetError, glyph_fonts, glyphs
from lsmha_fast.data._hashing import SampleDraws, make_key
from lsmha_fast.data.dataset import channel_stats
from lsmha_fast.data.glyph_classes import CHARACTERS, CLASS_NAMES, COARSE_NAMES, COARSE_OF_CLASS

TIERS = list(glyphs.TIERS)


@pytest.mark.parametrize("tier", TIERS)
def test_pixels_are_the_published_ones(tier):
    assert glyphs.sample_sha256(tier) == glyphs.TIERS[tier].sample_sha256
    assert data.verify("glyphs100", tier=tier)[-1].endswith("published sha256")


@pytest.mark.parametrize("tier", TIERS)
def test_an_image_depends_on_its_own_number_alone(tier):
    full = glyphs.draw_images(np.arange(600), "train", tier=tier)
    index = np.random.default_rng(0).permutation(600)[:77]
    assert np.array_equal(glyphs.draw_images(index, "train", tier=tier), full[index])
    assert np.array_equal(
        data.load_dataset("glyphs100", "train", size=5, tier=tier).images, full[:5]
    )


@pytest.mark.parametrize("tier", TIERS)
def test_statistics_are_those_of_the_training_split(tier):
    train = data.load_dataset("glyphs100", "train", tier=tier)
    assert channel_stats(train.images) == (train.mean, train.std)


def test_seeds_tiers_and_splits_differ():
    index = np.arange(100)
    images = [
        glyphs.draw_images(index, "train"),
        glyphs.draw_images(index, "train", seed=1),
        glyphs.draw_images(index, "train", tier="medium"),
        glyphs.draw_images(index, "test"),
    ]
    for i in range(4):
        for j in range(i):
            assert (images[i] != images[j]).any((1, 2, 3)).mean() > 0.98


def test_no_training_image_shows_a_test_face(monkeypatch):
    assert set(glyph_fonts.TRAIN_FACES).isdisjoint(glyph_fonts.TEST_FACES)
    assert len(glyph_fonts.TRAIN_FACES) == 10
    assert len(glyph_fonts.TEST_FACES) == 2
    used = []
    real = glyph_fonts.bitmaps
    monkeypatch.setattr(glyph_fonts, "bitmaps", lambda face: used.append(face) or real(face))
    for split, faces in glyphs.FACES_OF_SPLIT.items():
        used.clear()
        glyphs._padded_bitmaps.cache_clear()
        glyphs.draw_images(np.arange(10), split)
        assert sorted(used) == sorted(faces)


def test_labels_and_groups():
    dataset = data.load_dataset("glyphs100", "test")
    assert dataset.generated
    assert dataset.name == "glyphs100-easy (generated)"
    assert dataset.labels.bincount().tolist() == [20] * 100
    assert torch.equal(dataset.coarse_labels, torch.tensor(COARSE_OF_CLASS)[dataset.labels])
    assert dataset.class_names[dataset.labels[55]] == "Psi"
    assert dataset.coarse_names[dataset.coarse_labels[55]] == "Greek"


def test_one_hundred_distinct_classes():
    assert len(set(CHARACTERS)) == len(set(CLASS_NAMES)) == 100
    assert np.bincount(COARSE_OF_CLASS).tolist() == [10, 20, 18, 18, 16, 18]
    assert len(COARSE_NAMES) == 6


@pytest.mark.parametrize("face", glyph_fonts.FACES)
def test_no_two_classes_look_alike_in_any_face(face):
    ink = glyph_fonts.bitmaps(face).reshape(100, -1).astype(np.float32) / 255
    difference = ((ink[:, None] - ink[None]) ** 2).sum(-1)
    smaller = np.minimum(ink.sum(-1)[:, None], ink.sum(-1)[None])
    share = difference / smaller + np.eye(100)
    # the closest pair, A and Lambda of a bold serif, differs by the bar
    assert share.min() > 0.05


@pytest.mark.parametrize("face", glyph_fonts.FACES)
def test_fill_agrees_with_freetype(face):
    """FreeType at sixteen times the resolution, where its hinting moves edges by little."""
    from PIL import Image, ImageDraw, ImageFont

    path, units = str(glyph_fonts.check_font(face)), 2.5  # font units per pixel
    font = ImageFont.truetype(path, 2048 / units, layout_engine=ImageFont.Layout.BASIC)
    for i in range(0, 100, 7):
        canvas = Image.new("L", (2048, 1024))
        position = (300, 512 + 636 / units)
        ImageDraw.Draw(canvas).text(position, CHARACTERS[i], font=font, fill=255, anchor="ls")
        left, _, right, _ = canvas.getbbox()
        if (right - left) * units > 2200:  # condensed on purpose
            continue
        centred = np.roll(np.asarray(canvas, dtype=np.float32), 512 - (left + right) // 2, 1)
        theirs = centred[:, :1024].reshape(64, 16, 64, 16).mean((1, 3))
        ours = glyph_fonts.bitmaps(face)[i].astype(np.float32)
        overlap = np.minimum(ours, theirs).sum() / np.maximum(ours, theirs).sum()
        assert overlap > 0.95, f"{CHARACTERS[i]} {overlap}"


def test_ink_stays_off_the_border():
    for face in glyph_fonts.FACES:
        ink = glyph_fonts.bitmaps(face)
        assert max(ink[:, 0].max(), ink[:, -1].max(), ink[:, :, 0].max(), ink[:, :, -1].max()) == 0


def test_another_font_version_is_refused(tmp_path):
    face = glyph_fonts.FACES[0]
    good = glyph_fonts.check_font(face).read_bytes()
    copy = tmp_path / f"DejaVu{face}.ttf"
    copy.write_bytes(good)
    assert glyph_fonts.check_font(face, tmp_path) == copy
    copy.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(
        DatasetError, match=rf"sha256 \w{{64}}, expected {glyph_fonts.FONT_SHA256[face]}"
    ):
        glyph_fonts.check_font(face, tmp_path)
    with pytest.raises(DatasetError, match="needs the font file"):
        glyph_fonts.check_font(glyph_fonts.FACES[1], tmp_path)
    with pytest.raises(DatasetError, match="unknown face 'Comic'; allowed: Sans-Bold"):
        glyph_fonts.check_font("Comic")


def test_sample_draws_are_uniform_and_in_range():
    draws = SampleDraws(make_key("test"), np.arange(20_000))
    for low, high in ((0, 1), (-3, 3), (0, 9), (90, 165)):
        values = draws.integers(low, high, 2)
        assert values.shape == (20_000, 2)
        counts = np.bincount(values.reshape(-1) - low, minlength=high - low + 1)
        expected = values.size / (high - low + 1)
        # five standard deviations of a binomial count
        assert len(counts) == high - low + 1
        assert np.abs(counts - expected).max() < 5 * expected**0.5
    first, second = draws.integers(0, 1 << 20, 2).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.04


def test_generation_is_fast():
    glyphs.draw_images(np.arange(1), "train", tier="hard")  # fonts are read once
    start = time.process_time()
    glyphs.draw_images(np.arange(1200), "train", tier="hard")
    # a tenth of the default training and test images in a tenth of five seconds, times two
    assert time.process_time() - start < 1.0
