"""The digits are scikit-learn's, split per class once and for all."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lsmha_fast import data
from lsmha_fast.data import DatasetError, digits


def test_splits_partition_the_digits():
    pixels, labels = digits.read_digits()
    train, test = (data.load_dataset("digits", split, size=8) for split in ("train", "test"))
    assert (len(train), len(test)) == (1438, 359)
    every = sorted(bytes(x.numpy()) for x in torch.cat([train.images, test.images])[:, 0])
    assert every == sorted(bytes(x) for x in (pixels.astype(int) * 255 // 16).astype(np.uint8))
    share = test.labels.bincount().numpy() / np.bincount(labels)
    assert np.abs(share - 0.2).max() < 0.01


def test_split_is_the_same_everywhere():
    test = data.load_dataset("digits", "test")
    digest = hashlib.sha256(test.images.numpy().tobytes() + test.labels.numpy().tobytes())
    assert digest.hexdigest() == "1a95caffd3f0360a72b250432d84ef1849ebc5fdceccd3c1e4f43cac4d07cc1e"


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_upsampling_is_bilinear(size):
    pixels, _ = digits.read_digits()
    x = torch.from_numpy(pixels[:50]).double()[:, None] * (255 / 16)
    expected = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)[:, 0]
    actual = digits._upsample(pixels[:50], size // 8)
    # integer division rounds down
    assert (expected - torch.from_numpy(actual).double()).min() > -1e-6
    assert (expected - torch.from_numpy(actual).double()).max() < 1


def test_statistics_are_those_of_the_training_split():
    train, test = (data.load_dataset("digits", split) for split in ("train", "test"))
    x = train.images.double() / 255
    assert train.mean == test.mean == tuple(round(v, 4) for v in x.mean((0, 2, 3)).tolist())
    assert not train.generated


def test_other_data_are_refused(monkeypatch):
    monkeypatch.setattr(digits, "DIGITS_SHA256", "0" * 64)
    with pytest.raises(DatasetError, match=r"sha256 \w{64}, expected 0{64}"):
        data.load_dataset("digits", "train")
