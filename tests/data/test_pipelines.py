"""make_batches: timm as the oracle, and nothing depends on ranks, batch size, order or resuming."""

import random
import subprocess
import sys
from unittest import mock

import augment_oracle
import numpy as np
import pytest
import torch
from timm.data import FastCollateMixup, create_transform
from timm.data.loader import PrefetchLoader
from timm.data.mixup import mixup_target

from lsmha_fast.data import (
    PIPELINES,
    AugmentConfig,
    DatasetError,
    ImageDataset,
    default_config,
    make_batches,
    normalize,
)
from lsmha_fast.data.draws import draw_plan
from lsmha_fast.data.mix import draw_mix, soft_targets
from lsmha_fast.data.timm_batches import seed_all

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def dataset(M=48, H=16, W=16, K=7):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (M, 3, H, W), generator=generator).to(torch.uint8)
    names = tuple(str(k) for k in range(K))
    return ImageDataset("noise", images, torch.arange(M) % K, names, MEAN, STD)


def make(pipeline="device", data=None, batch_size=12, config=None, **options):
    data, config = data or dataset(), config or AugmentConfig()
    return make_batches(data, batch_size=batch_size, pipeline=pipeline, config=config, **options)


def whole_epoch(batches, epoch=0, start=0):
    images, targets = zip(*batches.epoch(epoch, start), strict=True)
    return torch.cat(images), torch.cat(targets)


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_batches_are_normalised_images_and_soft_targets(pipeline):
    batches = make(pipeline, dtype=torch.bfloat16, seed=3)
    assert len(batches) == 4
    assert batches.num_images == 48
    for images, targets in batches.epoch(1):
        assert images.shape == (12, 3, 16, 16)
        assert images.dtype == torch.bfloat16
        assert targets.shape == (12, 7)
        assert targets.dtype == torch.float32
        assert torch.allclose(targets.sum(1), torch.ones(12), atol=1e-6)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_resumed_epoch_is_the_same(pipeline):
    batches = make(pipeline, seed=3)
    images, targets = whole_epoch(batches, epoch=2)
    rest = whole_epoch(make(pipeline, seed=3), epoch=2, start=3)
    assert_same(rest, (images[36:], targets[36:]))
    assert list(batches.epoch(2, start=4)) == []


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_seeds_and_epochs_differ(pipeline):
    base = whole_epoch(make(pipeline, seed=0))[0]
    assert not torch.equal(base, whole_epoch(make(pipeline, seed=1))[0])
    assert not torch.equal(base, whole_epoch(make(pipeline, seed=0), epoch=1)[0])


@pytest.mark.parametrize("pipeline", ["device", "recipe"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_compute_what_one_computes(pipeline, world_size):
    alone = make(pipeline, seed=3)
    ranks = [make(pipeline, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    positions = [torch.arange(r, 6, world_size) for r in range(world_size)]
    positions = torch.cat([torch.cat([p, 11 - p.flip(0)]) for p in positions])
    for whole, *parts in zip(alone.epoch(1), *(r.epoch(1) for r in ranks), strict=True):
        together = [torch.cat(t) for t in zip(*parts, strict=True)]
        assert_same([t[positions] for t in whole], together)


@pytest.mark.parametrize("pipeline", ["device", "recipe"])
@pytest.mark.parametrize("batch_size", [2, 16, 48])
def test_without_mixing_the_batch_size_changes_nothing(pipeline, batch_size):
    config = AugmentConfig(mixup=0.0, cutmix=0.0)
    expected = whole_epoch(make(pipeline, config=config, seed=3))
    actual = whole_epoch(make(pipeline, config=config, seed=3, batch_size=batch_size))
    assert_same(expected, actual)


def test_the_order_of_the_samples_changes_no_image():
    data, config = dataset(), AugmentConfig(mixup=0.0, cutmix=0.0)
    first, second = make(data=data, config=config), make(data=data, config=config)
    with mock.patch.object(type(second._batches), "order", return_value=torch.arange(48)):
        in_order = whole_epoch(second)
    order = torch.cat([i for _, i in first.indices(0)])
    assert_same(whole_epoch(first), [t[order] for t in in_order])


@pytest.mark.parametrize("batch_size, sizes", [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (5, [5])])
def test_odd_batches_and_single_images(batch_size, sizes):
    data = dataset(5, 9, 14)
    batches = make(data=data, batch_size=batch_size, drop_last=False)
    assert [len(x) for x, _ in batches.epoch(0)] == sizes
    assert batches.num_images == 5
    dropped = make(data=data, batch_size=batch_size)
    assert dropped.num_images == 5 // batch_size * batch_size


def test_device_gives_timms_pixels_for_the_same_draws():
    """Crop to erasing, mixed as FastCollateMixup mixes, normalised as PrefetchLoader does."""
    data = dataset(32, 32, 32)
    batches = make(data=data, batch_size=8, config=AugmentConfig(erase_prob=0.0), seed=9)
    fill = [round(255 * v) for v in MEAN]
    kinds = set()
    for (step, index), (images, targets) in zip(batches.indices(4), batches.epoch(4), strict=True):
        plan = draw_plan(batches.config, 9, 4, index, 32, 32)
        pictures = []
        for b, i in enumerate(index.tolist()):
            picture = augment_oracle.crop(
                augment_oracle.to_pil(data.images[i]), plan.crops[b].tolist()
            )
            for layer in plan.layers[b].tolist():
                picture = augment_oracle.layer(picture, layer, fill)
            pictures.append(augment_oracle.to_tensor(picture))
        mix = batches.mix(4, step)
        kinds.add(bool(mix.cut))
        collate = FastCollateMixup(0.8, 1.0, label_smoothing=0.1, num_classes=7)
        collate._params_per_batch = lambda mix=mix: (mix.weight, bool(mix.cut))
        top, bottom, left, right = mix.cut or (0, 0, 0, 0)
        box = ((top, bottom, left, right), mix.weight)
        with mock.patch("timm.data.mixup.cutmix_bbox_and_lam", return_value=box):
            mixed, expected = collate(list(zip(pictures, data.labels[index], strict=True)))
        loader = PrefetchLoader([(mixed, expected)], MEAN, STD, device=torch.device("cpu"))
        ((normalised, _),) = list(loader)
        assert_same((images, targets), (normalised, expected))
    assert kinds == {True, False}


def test_recipe_is_timm_seeded_by_sample():
    data, config = dataset(12, 32, 32), AugmentConfig(mixup=0.0, cutmix=0.0, erase_prob=0.0)
    batches = make("recipe", data=data, config=config, seed=5)
    transform = create_transform(
        (3, 32, 32),
        is_training=True,
        use_prefetcher=True,
        scale=(0.8, 1.0),
        ratio=(3 / 4, 4 / 3),
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="random",
        mean=MEAN,
        std=STD,
    )
    ((images, _),) = list(batches.epoch(0))
    ((_, index),) = batches.indices(0)
    for image, i in zip(images, index.tolist(), strict=True):
        seed_all(batches._key("image", 0, i))
        expected = transform(augment_oracle.to_pil(data.images[i]))
        assert torch.equal(image, normalize(expected[None], MEAN, STD)[0])


def test_the_transforms_are_those_of_the_recipe():
    text = repr(make("recipe", data=dataset(12, 32, 32))._transforms._transform)
    for part in (
        "scale=(0.8, 1.0), ratio=(0.75, 1.3333), interpolation=bilinear bicubic",
        "RandomHorizontalFlip(p=0.5)",
        "RandAugment(n=2",
        "name=PosterizeIncreasing, p=0.5, m=9, mstd=0.5",
    ):
        assert part in text
    assert "ColorJitter" not in text


def test_recipe_does_not_depend_on_its_workers():
    assert_same(whole_epoch(make("recipe")), whole_epoch(make("recipe", workers=2)))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_global_generators_are_left_alone(pipeline):
    states = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        if states:
            whole_epoch(make(pipeline))
        states.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert states[0] == states[1]


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.99])
def test_targets_are_timms(weight):
    labels = torch.tensor([3, 0, 3, 6])
    expected = mixup_target(labels, 7, lam=weight, smoothing=0.1)
    assert torch.equal(soft_targets(labels, 7, weight, 0.1), expected)


def test_mixing_weights_are_timms():
    """Equal numbers, equal methods, weights and boxes."""
    numbers = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.9, "switch_prob": 0.5}
    theirs = FastCollateMixup(**numbers)
    found = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        functions = {
            "numpy.random.rand": rng.random,
            "numpy.random.beta": rng.beta,
            "numpy.random.randint": lambda low, high, size, rng=rng: rng.integers(low, high),
        }
        images = [(torch.full((3, 10, 14), v, dtype=torch.uint8), 0) for v in (0, 200)]
        with mock.patch.multiple("numpy.random", **{k[13:]: f for k, f in functions.items()}):
            output = torch.zeros(2, 3, 10, 14, dtype=torch.uint8)
            weight = theirs._mix_batch_collate(output, images)
        mix = draw_mix(np.random.default_rng(seed), 10, 14, **numbers)
        assert mix.weight == weight
        pasted = torch.zeros(10, 14, dtype=torch.bool)
        if mix.cut:
            top, bottom, left, right = mix.cut
            pasted[top:bottom, left:right] = True
            assert torch.equal(output[0, 0] == 200, pasted)
        found.add((bool(mix.cut), mix.weight == 1.0))
    assert {(True, False), (False, False), (False, True)} <= found


def test_evaluation_is_normalised_as_timm_does():
    images = dataset().images
    loader = PrefetchLoader([(images, torch.zeros(1))], MEAN, STD, device=torch.device("cpu"))
    ((expected, _),) = list(loader)
    assert torch.equal(normalize(images, MEAN, STD), expected)
    transform = create_transform(
        (3, 16, 16), crop_pct=1.0, interpolation="bicubic", use_prefetcher=True
    )
    picture = augment_oracle.to_pil(images[0])
    assert torch.equal(torch.as_tensor(transform(picture)), images[0]), "no resize"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pipeline": "dali"}, "pipeline must be one of device, recipe, light, got 'dali'"),
        ({"workers": 2}, "workers must be >= 0, and 0 for the pipeline 'device', got 2"),
        ({"rank": 2, "world_size": 2}, "rank must lie in 0..world_size-1, got 2 of 2"),
        ({"world_size": 4}, "multiple of 2 \\* world_size = 8, .*got 12 and True"),
        ({"batch_size": 100}, "leaves no batch of 48 images"),
        ({"pipeline": "recipe", "batch_size": 3}, "batch_size must be even .*got 3 and True"),
        ({"pipeline": "recipe", "drop_last": False}, "got 12 and False"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(DatasetError, match=message):
        make(**options)


def test_without_timm_the_recipe_says_what_to_install():
    code = (
        "import sys; sys.modules['timm'] = None; sys.modules['timm.data'] = None\n"
        "import torch; from lsmha_fast import data\n"
        "images, labels = torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.zeros(8).long()\n"
        "digits = data.ImageDataset('digits', images, labels, ('0',), (0.5,) * 3, (0.5,) * 3)\n"
        "next(data.make_batches(digits, batch_size=4).epoch(0))\n"
        "try: data.make_batches(digits, batch_size=4, pipeline='recipe')\n"
        "except data.DatasetError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = 'the pipeline recipe needs the package timm: pip install "lsmha_fast[train]"\n'
    assert done.stdout == expected


def test_default_configs():
    assert default_config("cifar100") == AugmentConfig()
    assert default_config("glyphs100/easy").hflip == 0.0
    with pytest.raises(DatasetError, match="unknown data set 'noise'"):
        default_config("noise")
