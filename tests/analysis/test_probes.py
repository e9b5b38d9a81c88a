"""Probes learn what a block knows, whatever the memory budget, and survive a save."""

import pytest
import torch
from tiny_model import TinyModel, random_batches, random_probes
from torch import nn

from lsmha_fast.analysis import Probes, evaluate_probes, train_probes

K, N = 4, 6


class PlantedModel(nn.Module):
    """Three blocks that know nothing, the parity of the label, and the label.

    An image is one column of tokens; the label stands in one token, the others hold noise in a
    channel apart, so that a probe has to find the token.
    """

    def forward_with_heads(self, images):
        nothing = torch.ones(len(images), N, 1, 2)
        parity, label = images[:, :, K : K + 2], images[:, :, :K]
        mark = images[:, :, -2:]
        return (
            images[:, 0, :K],
            (
                nothing,
                torch.cat([parity, mark], 2).unflatten(2, (2, 2)),
                torch.cat([label, mark], 2).unflatten(2, (3, 2)),
            ),
        )


def planted_batches(count, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % K
    images = torch.zeros(count, N, K + 4)
    images[:, :, :-2] = torch.randn(count, N, K + 2, generator=generator) * 0.6
    images[:, :, -2] = -1  # noise
    place = torch.randint(N, (count,), generator=generator)
    rows = torch.arange(count)
    images[rows, place] = 0
    images[rows, place, -1] = 1  # the label stands here
    images[rows, place, labels] = 1
    images[rows, place, K + labels % 2] = 1
    return list(zip((images * scale).split(40), labels.split(40), strict=True))


@pytest.mark.parametrize(("scale", "layer_norm"), [(1.0, False), (0.01, False), (1.0, True)])
def test_planted_knowledge_is_found(scale, layer_norm):
    train, test = planted_batches(400, 1, scale), planted_batches(200, 2, scale)
    seen = []
    probes = train_probes(
        PlantedModel(),
        train,
        val_batches=test,
        epochs=25,
        lr=0.03,
        layer_norm=layer_norm,
        progress=lambda *args: seen.append(args),
    )
    nothing, parity, label = probes.accuracy
    assert nothing == 1 / K
    # within a parity nothing tells the two labels apart
    assert parity == pytest.approx(0.5, abs=0.1)
    assert label >= 0.97
    assert probes.block_names == ("block 1", "block 2", "block 3")
    assert [done for done, _, _ in seen] == list(range(1, 26))
    assert seen[-1][2] < 0.9 * seen[0][2]


def test_probe_separates_parities_exactly():
    train, test = planted_batches(400, 1), planted_batches(200, 2)
    model = PlantedModel()
    probes = train_probes(model, train, epochs=25, lr=0.03)
    for images, labels in test:
        logits = probes.logits(1, model.forward_with_heads(images)[1][1])
        assert (logits.argmax(1) % 2 == labels % 2).float().mean() >= 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_memory_budget_changes_the_time_only(model, batches, dtype):
    kept = train_probes(model, batches, epochs=3, feature_dtype=dtype)
    calls, model.calls = model.calls, 0
    again = train_probes(model, batches, epochs=3, feature_dtype=dtype, cache_bytes=0)
    assert (calls, model.calls) == (1 + len(batches), 1 + 3 * len(batches))
    assert_same(kept, again)


def test_budget_holds_just_what_it_says(model, batches):
    images = sum(len(labels) for _, labels in batches)
    need = images * (8 * (3 * 4 + 5 * 2) * 2 + 8)
    train_probes(model, batches, epochs=2, cache_bytes=need)
    assert model.calls == 1 + len(batches)
    model.calls = 0
    train_probes(model, batches, epochs=2, cache_bytes=need - 1)
    assert model.calls == 1 + 2 * len(batches)


def bytes_of(sizes):
    """Features of batches of TinyModel in fp16, and their labels."""
    return sum(sizes) * (8 * (3 * 4 + 5 * 2) * 2 + 8)


@pytest.mark.parametrize("in_memory", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_memory_does_not_hold_lies_on_disk(model, batches, tmp_path, in_memory, dtype):
    sizes = [len(labels) for _, labels in batches]
    kept = train_probes(model, batches, epochs=3, feature_dtype=dtype)
    model.calls = 0
    used = []

    def look(*_):
        used.append(sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()))

    again = train_probes(
        model,
        batches,
        epochs=3,
        feature_dtype=dtype,
        cache_bytes=bytes_of(sizes[:in_memory]),
        disk_bytes=bytes_of(sizes[in_memory:]),
        disk_folder=tmp_path,
        progress=look,
    )
    assert model.calls == 1 + len(batches)
    assert used == [bytes_of(sizes[in_memory:])] * 3
    assert_same(kept, again)
    assert list(tmp_path.iterdir()) == []


def test_what_neither_holds_is_recomputed(model, batches, tmp_path):
    sizes = [len(labels) for _, labels in batches]
    used = []
    train_probes(
        model,
        batches,
        epochs=3,
        cache_bytes=bytes_of(sizes[:1]),
        disk_bytes=bytes_of(sizes[1:]) - 1,
        disk_folder=tmp_path,
        progress=lambda *_: used.append(len(list(tmp_path.iterdir()))),
    )
    assert model.calls == 1 + 3 * len(batches)
    assert used == [0, 0, 0]


def test_broken_off_pass_leaves_no_rest(model, batches, tmp_path):
    from lsmha_fast.analysis._features import CachedHeads

    size = bytes_of([len(labels) for _, labels in batches])
    features = CachedHeads(
        model.eval(), batches, torch.device("cpu"), torch.float16, 0, size, tmp_path
    )
    next(iter(features))
    first, second = list(features), list(features)
    assert model.calls == 1 + len(batches)
    for (a, labels), (b, again) in zip(first, second, strict=True):
        assert torch.equal(labels, again)
        assert all(map(torch.equal, a, b))


def test_seed_decides(model, batches):
    first = train_probes(model, batches, epochs=2, seed=3)
    torch.manual_seed(99)
    assert_same(first, train_probes(model, batches, epochs=2, seed=3))
    other = train_probes(model, batches, epochs=2, seed=4)
    assert not torch.equal(first.blocks[0].fc_weight, other.blocks[0].fc_weight)


def test_model_is_left_as_it_was(batches):
    model = TinyModel().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    train_probes(model, batches, val_batches=batches, epochs=2)
    assert model.training
    assert model.dropout.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_accuracy_by_hand(model):
    probes = random_probes(model)
    model.eval()
    images = torch.randn(12, 8, 6)
    logits, heads = model.forward_with_heads(images)
    right = probes.logits(0, heads[0]).argmax(1)
    wrong = (right + 1) % 4
    labels = torch.where(torch.arange(12) < 9, right, wrong)
    pairs = list(zip(images.split(5), labels.split(5), strict=True))
    measured = evaluate_probes(model, probes, pairs)
    assert measured.accuracy[0] == 0.75
    assert measured.model_accuracy == pytest.approx((logits.argmax(1) == labels).double().mean())


def test_saved_and_loaded(model, batches, tmp_path):
    probes = train_probes(model, batches, val_batches=batches, epochs=1, layer_norm=True)
    path = probes.save(tmp_path / "new" / "probes.safetensors")
    back = Probes.load(path)
    assert_same(probes, back)
    for field in ("block_names", "layer_norm", "accuracy", "model_accuracy", "settings"):
        assert getattr(back, field) == getattr(probes, field)
    assert [p.name for p in path.parent.iterdir()] == ["probes.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "text", "foreign", "shape"])
def test_damaged_file_is_an_error(model, tmp_path, damage):
    from safetensors.torch import save_file

    path = tmp_path / "probes.safetensors"
    probes = random_probes(model)
    if damage == "shape":
        first = probes.blocks[0]._replace(fc_weight=torch.zeros(4, 3, 3))
        probes = Probes((first, probes.blocks[1]), probes.block_names)
    probes.save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "text":
        path.write_text("not tensors")
    elif damage == "foreign":
        save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"probes\.safetensors: not a readable probes file"):
        Probes.load(path)


def test_interrupted_save_leaves_the_earlier_file(model, tmp_path, monkeypatch):
    path = random_probes(model).save(tmp_path / "probes.safetensors")
    before = path.read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        random_probes(model).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["probes.safetensors"]


def test_bad_input_is_an_error(model, batches):
    with pytest.raises(ValueError, match="epochs=0"):
        train_probes(model, batches, epochs=0)
    with pytest.raises(ValueError, match="batches is a one-way iterator"):
        train_probes(model, iter(batches))
    with pytest.raises(ValueError, match="no batches"):
        train_probes(model, [])
    with pytest.raises(ValueError, match="Linear has no forward_with_heads"):
        train_probes(nn.Linear(2, 2), batches)
    huge = [(images * 1e6, labels) for images, labels in random_batches()]
    with pytest.raises(ValueError, match=r"block 1 are not finite in torch\.float16.*float32"):
        train_probes(model, huge, epochs=1)
    with pytest.raises(ValueError, match="diverged in epoch 1; lower lr"):
        train_probes(model, batches * 20, epochs=1, lr=1e30)
    model.block_names = ("block 1",)
    with pytest.raises(ValueError, match="heads of 2 blocks but names them"):
        train_probes(model, batches, epochs=1)


def assert_same(a, b):
    for p, q in zip(a.blocks, b.blocks, strict=True):
        for s, t in zip(p, q, strict=True):
            assert torch.equal(s, t)
