"""The fields of a recipe arrive in the input pipeline."""

import dataclasses

import pytest
import torch
from tiny import TINY, stripes

from lsmha_fast.data import AugmentConfig
from lsmha_fast.train import preset
from lsmha_fast.train.config import PIPELINES
from lsmha_fast.train.input import augment_config, make_train_batches

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["compact-300", "compact-1500", "compact-5000"])
def test_the_presets_augmentation_is_the_published_one(name):
    assert augment_config(preset(name)) == AugmentConfig()


def test_every_field_arrives():
    config = dataclasses.replace(
        preset("compact-300"),
        auto_augment="rand-m5-inc1",
        crop_scale=(0.5, 0.9),
        crop_ratio=(1.0, 2.0),
        interpolation="bicubic",
        flip=0.1,
        erase=0.2,
        mixup=0.3,
        cutmix=0.4,
        mix_prob=0.6,
        mix_switch_prob=0.7,
        label_smoothing=0.8,
    )
    assert augment_config(config) == AugmentConfig(
        auto_augment="rand-m5-inc1",
        scale=(0.5, 0.9),
        ratio=(1.0, 2.0),
        interpolation="bicubic",
        hflip=0.1,
        erase_prob=0.2,
        mixup=0.3,
        cutmix=0.4,
        mix_prob=0.6,
        switch_prob=0.7,
        smoothing=0.8,
    )


def test_letters_are_not_mirrored_unless_asked():
    glyphs = dataclasses.replace(preset("compact-300"), data="glyphs100", flip=None)
    assert augment_config(glyphs).hflip == 0.0
    assert augment_config(dataclasses.replace(glyphs, flip=0.5)).hflip == 0.5


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_without_augmentation_images_are_only_normalised(pipeline):
    config = dataclasses.replace(
        TINY, pipeline=pipeline, augment=False, label_smoothing=0.0, drop_last=True
    )
    data = stripes("train")
    batches = make_train_batches(config, data, CPU)
    order = batches.indices(0)[0][1]
    images, targets = next(iter(batches.epoch(0)))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    torch.testing.assert_close(images, (data.images[order] / 255 - mean) / std)
    assert torch.equal(targets.argmax(1), data.labels[order])
