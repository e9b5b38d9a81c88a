"""Batches cover each sample once, in an order that only seed and epoch decide."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsmha_fast.data import Batches, DatasetError, ImageDataset, normalize


def numbered(count):
    """A data set whose image i holds the number i."""
    images = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
    index = torch.arange(count)
    images[:, 0], images[:, 1] = (index // 256)[:, None, None], (index % 256)[:, None, None]
    return ImageDataset(
        "numbered", images, index % 5, tuple("abcde"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    )


def numbers(batches):
    """Sample numbers per batch; checks that labels belong to their images."""
    out = []
    for images, labels in batches:
        index = images[:, 0, 0, 0].long() * 256 + images[:, 1, 0, 0]
        assert torch.equal(labels, index % 5)
        out.append(index.tolist())
    return out


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 300),
    batch_size=st.integers(1, 320),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_each_index_exactly_once(count, batch_size, seed, epoch, shuffle, drop_last):
    dataset = numbered(count)
    if drop_last and batch_size > count:
        with pytest.raises(DatasetError, match="leaves no batch"):
            Batches(dataset, batch_size, drop_last=True)
        return
    make = {"shuffle": shuffle, "seed": seed, "drop_last": drop_last}
    batches = Batches(dataset, batch_size, **make)
    batches.set_epoch(epoch)
    seen = numbers(batches)
    assert len(seen) == len(batches)
    assert all(len(part) == batch_size for part in seen[:-1])
    flat = [index for part in seen for index in part]
    assert len(set(flat)) == len(flat) == (count // batch_size * batch_size if drop_last else count)
    # history does not matter: a fresh object continues from any batch
    start = len(seen) // 2
    assert numbers(Batches(dataset, batch_size, **make).epoch(epoch, start)) == seen[start:]


def test_order_depends_on_seed_and_epoch():
    dataset = numbered(100)
    orders = {
        (seed, epoch): tuple(Batches(dataset, 10, shuffle=True, seed=seed).order(epoch).tolist())
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(set(orders.values())) == 25
    one, large = (Batches(dataset, size, shuffle=True, seed=3) for size in (1, 64))
    assert torch.equal(one.order(4), large.order(4))
    assert [i for [i] in numbers(one.epoch(4))] == [i for b in numbers(large.epoch(4)) for i in b]


def test_order_ignores_the_global_generator():
    batches = Batches(numbered(50), 7, shuffle=True, seed=1)
    torch.manual_seed(0)
    first = batches.order(2)
    torch.manual_seed(1)
    assert torch.equal(batches.order(2), first)


def test_order_is_the_same_everywhere():
    order = Batches(numbered(10), 4, shuffle=True, seed=7).order(3)
    assert order.tolist() == [5, 2, 8, 6, 9, 3, 0, 7, 1, 4]


def test_without_shuffle_the_order_is_kept():
    assert numbers(Batches(numbered(5), 2)) == [[0, 1], [2, 3], [4]]
    assert Batches(numbered(5), 2).num_images == 5


def test_bad_batch_size_is_refused():
    with pytest.raises(DatasetError, match="batch_size must be >= 1, got 0"):
        Batches(numbered(5), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalize(dtype):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    out = normalize(images, mean, std, dtype)
    assert out.dtype == dtype
    exact = images.double() / 255
    for c in range(3):
        expected = (exact[:, c] - mean[c]) / std[c]
        allowed = torch.finfo(dtype).eps * expected.abs().clamp(min=1)
        assert ((out[:, c].double() - expected).abs() <= allowed).all()
