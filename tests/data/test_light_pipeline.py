"""Every augmentation against a plain loop, on the device, reproducible from its generator."""

import pytest
import torch

from lsmha_fast.data import Augment, DatasetError, default_augment
from lsmha_fast.data.augment import box_mask, crop, flip

DTYPES = [torch.uint8, torch.float32, torch.float16]


def batch(dtype, B=16, H=12, W=10):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (B, 3, H, W), generator=generator).to(dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fill", ["zero", "edge"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_crop_equals_a_loop(dtype, fill):
    images = batch(dtype)
    B, _, H, W = images.shape
    dy = torch.randint(-4, 5, (B,))
    dx = torch.randint(-15, 16, (B,))
    expected = torch.zeros_like(images)
    for b in range(B):
        for i in range(H):
            for j in range(W):
                y, x = i + int(dy[b]), j + int(dx[b])
                if fill == "edge":
                    y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
                if 0 <= y < H and 0 <= x < W:
                    expected[b, :, i, j] = images[b, :, y, x]
    out = crop(images, dy, dx, fill=fill)
    assert out.dtype == dtype
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_crop_is_pad_and_cut(dtype):
    images = batch(dtype, B=200)
    B, _, H, W = images.shape
    out = Augment(crop_padding=2, flip=0.0)(images, seeded())
    padded = torch.nn.functional.pad(images.double(), (2, 2, 2, 2))
    found = set()
    for b in range(B):
        windows = {(i, j): padded[b, :, i : i + H, j : j + W] for i in range(5) for j in range(5)}
        matches = [key for key, window in windows.items() if torch.equal(out[b].double(), window)]
        assert len(matches) == 1
        found.update(matches)
    # 200 draws of 25 positions miss one with probability below 1 %
    assert len(found) == 25


@pytest.mark.parametrize("dtype", DTYPES)
def test_flip_mirrors_the_chosen_alone(dtype):
    images = batch(dtype)
    chosen = torch.arange(16) % 3 == 0
    out = flip(images, chosen)
    assert torch.equal(out[chosen], images[chosen].flip(3))
    assert torch.equal(out[~chosen], images[~chosen])
    assert torch.equal(Augment(crop_padding=0, flip=1.0)(images), images.flip(3))
    assert torch.equal(Augment(crop_padding=0, flip=0.0)(images), images)


def test_flip_happens_as_often_as_asked():
    images = batch(torch.uint8, B=4000, H=2, W=2)
    out = Augment(crop_padding=0, flip=0.3)(images, seeded())
    flipped = (out == images.flip(3)).flatten(1).all(1) & (out != images).flatten(1).any(1)
    # five standard deviations of 4 000 draws
    assert abs(flipped.float().mean() - 0.3) < 0.037


def erased_boxes(augment, B=500, side=32):
    """Row and column extents of what was erased from images without a zero."""
    images = torch.full((B, 3, side, side), 7.0)
    out = augment(images, seeded())
    changed = (out != images).any(1)
    return changed, out


@pytest.mark.parametrize("mode", ["pixel", "zero"])
def test_erased_part_is_one_rectangle_of_allowed_area(mode):
    augment = Augment(crop_padding=0, flip=0.0, erase_prob=1.0, erase_mode=mode)
    changed, out = erased_boxes(augment)
    area = changed.sum((1, 2))
    heights, widths = changed.any(2).sum(1), changed.any(1).sum(1)
    assert torch.equal(area, heights * widths)
    # sides are rounded to whole pixels
    low, high = (torch.sqrt(torch.tensor(v)) * 32 for v in augment.erase_area)
    assert (torch.sqrt(area.double()) > low - 1).all()
    assert (torch.sqrt(area.double()) < high + 1).all()
    assert area.double().std() > 50
    if mode == "zero":
        assert (out[changed[:, None].expand_as(out)] == 0).all()
    else:
        noise = out[changed[:, None].expand_as(out)]
        assert abs(noise.mean()) < 0.02
        assert abs(noise.std() - 1) < 0.02


def test_erasing_reaches_every_pixel_and_every_shape():
    changed, _ = erased_boxes(Augment(crop_padding=0, flip=0.0, erase_prob=1.0), B=2000)
    frequency = changed.float().mean(0)
    assert frequency.min() > 0
    assert torch.allclose(frequency, frequency.flip(0), atol=0.06)
    assert torch.allclose(frequency, frequency.T, atol=0.06)


def test_erasing_happens_as_often_as_asked():
    augment = Augment(crop_padding=0, flip=0.0, erase_prob=0.25)
    changed, _ = erased_boxes(augment, B=4000)
    assert abs(changed.any(2).any(1).float().mean() - 0.25) < 0.035


def test_erasing_bytes_fills_with_bytes():
    images = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    out = Augment(crop_padding=0, flip=0.0, erase_prob=1.0, erase_area=(0.3, 0.3))(images, seeded())
    assert out.dtype == torch.uint8
    noise = out[out != 0].float()
    assert abs(noise.mean() - 128) < 1
    assert out.max() == 255


def test_box_mask():
    one = torch.tensor
    mask = box_mask(4, 5, one([1]), one([3]), one([0]), one([2]))
    assert mask.shape == (1, 1, 4, 5)
    assert mask[0, 0].nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_generator_same_result(dtype):
    images = batch(dtype, B=64)
    augment = Augment(crop_padding=2, flip=0.5, erase_prob=0.5)
    first, again, other = (augment(images, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == dtype
    assert torch.equal(images, batch(dtype, B=64)), "the input must not change"


def test_empty_batch():
    images = torch.zeros(0, 3, 8, 8)
    assert Augment(erase_prob=1.0)(images, seeded()).shape == images.shape


def test_channels_last_and_sliced_inputs():
    images = batch(torch.float32)
    augment = Augment(crop_padding=2, flip=0.5, erase_prob=0.5)
    expected = augment(images, seeded())
    wide = torch.zeros(16, 3, 12, 20)
    wide[..., ::2] = images
    for view in (images.to(memory_format=torch.channels_last), wide[..., ::2]):
        assert torch.equal(augment(view, seeded()), expected)


@pytest.mark.gpu
def test_device_and_cpu_agree():
    images = batch(torch.float32, B=64)
    augment = Augment(crop_padding=2, flip=0.5, erase_prob=0.5)
    assert torch.equal(augment(images.cuda(), seeded()).cpu(), augment(images, seeded()))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"crop_padding": -1}, ">= 0, got -1"),
        ({"flip": 1.5}, r"flip must lie in \[0, 1\], got 1.5"),
        ({"erase_prob": -0.1}, "erase_prob must lie"),
        ({"crop_fill": "wrap"}, "'wrap'"),
        ({"erase_mode": "black"}, "'black'"),
        ({"erase_area": (0.5, 0.2)}, "erase_area must be 0 < low <= high <= 1.0, got 0.5, 0.2"),
        ({"erase_aspect": (0.0, 2.0)}, "erase_aspect must be"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(DatasetError, match=message):
        Augment(**options)


def test_letters_and_digits_are_never_mirrored():
    for name in ("digits", "glyphs100", "glyphs100-hard (generated)"):
        assert default_augment(name).flip == 0
    assert default_augment("cifar100").flip == 0.5
