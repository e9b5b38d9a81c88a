"""SHP equals the naive way: one forward pass of the probe per head, all other heads silenced."""

import pytest
import torch
from tiny_model import random_batches, random_probes
from torch.nn import functional as F

from lsmha_fast.analysis import (
    SHP,
    find_clusters,
    rank_heads,
    signal_to_noise,
    single_head_performance,
)


def naive_matrix(model, probes, batches, block, head, pooling, bias):
    """(K, K) by zeroing the channels of all other heads, in plain PyTorch."""
    pool, fc, fc_bias = probes.blocks[block]
    fields = []
    for images, _ in batches:
        x = model.forward_with_heads(images)[1][block]
        if probes.layer_norm:
            x = F.layer_norm(x, x.shape[2:])
        silenced = torch.zeros_like(x)
        silenced[:, :, head] = x[:, :, head]
        seen = silenced if pooling == "head" else x
        p = torch.softmax(seen.flatten(2) @ pool.flatten(), dim=1)  # (B, N)
        pooled = torch.einsum("bn,bnc->bc", p, silenced.flatten(2))
        fields.append(pooled @ fc.flatten(1).T + (fc_bias if bias else 0))
    fields, labels = torch.cat(fields), torch.cat([labels for _, labels in batches])
    return torch.stack([fields[labels == k].mean(0) for k in range(4)])


@pytest.mark.parametrize("pooling", ["head", "full"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_equals_one_masked_pass_per_head(model, batches, pooling, bias, layer_norm):
    probes = random_probes(model, layer_norm)
    shp = single_head_performance(model, probes, batches, pooling=pooling, bias=bias)
    model.eval()
    for block, (H, _) in enumerate(model.shapes):
        for head in range(H):
            naive = naive_matrix(model, probes, batches, block, head, pooling, bias)
            error = (shp.matrices[block][head] - naive).abs().max()
            assert error <= 1e-5 * naive.abs().max()


def test_fields_of_all_heads_add_up_to_the_probe(model, batches):
    probes = random_probes(model)
    shp = single_head_performance(model, probes, batches, pooling="full")
    model.eval()
    labels = torch.cat([labels for _, labels in batches])
    for block in range(2):
        with torch.no_grad():
            logits = torch.cat(
                [probes.logits(block, model.forward_with_heads(x)[1][block]) for x, _ in batches]
            )
        means = torch.stack([logits[labels == k].mean(0) for k in range(4)])
        total = shp.matrices[block].sum(0) + probes.blocks[block].fc_bias
        torch.testing.assert_close(total, means, rtol=1e-5, atol=1e-5)


def test_one_forward_pass_and_the_same_modes_afterwards(model, batches):
    model.fc.eval()
    single_head_performance(model, random_probes(model), batches)
    assert model.calls == len(batches)
    assert model.training
    assert model.dropout.training
    assert not model.fc.training


def test_batch_sizes_do_not_matter(model):
    images, labels = (torch.cat(t) for t in zip(*random_batches(), strict=True))
    probes = random_probes(model)
    one = single_head_performance(model, probes, [(images, labels)])
    many = single_head_performance(
        model, probes, list(zip(images.split(4), labels.split(4), strict=True))
    )
    assert torch.equal(one.counts, many.counts)
    for a, b in zip(one.matrices, many.matrices, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_label_without_images_has_zero_fields(model):
    batches = [(torch.randn(6, 8, 6), torch.tensor([0, 1, 3, 0, 1, 3]))]
    shp = single_head_performance(model, random_probes(model), batches, bias=True)
    assert shp.counts.tolist() == [2, 2, 0, 2]
    assert (shp.matrices[0][:, 2] == 0).all()
    assert (shp.matrices[0][:, 3] != 0).all()


def test_head_of_zeros_recognises_nothing(model, batches):
    """Neutral values all the way: zero fields, no clusters, no signal, first to be pruned."""
    with torch.no_grad():
        for parameter in (model.maps[0].weight, model.maps[0].bias):
            parameter[4:8] = 0  # head 1 of block 2
    shp = single_head_performance(model, random_probes(model), batches)
    fields = shp.matrix(0)
    assert (fields[1] == 0).all()
    found = find_clusters(fields)
    assert not found.recognized[1].any()
    assert not found.above[1].any()
    alone = signal_to_noise(fields[1:2], find_clusters(fields[1:2]))
    assert alone.mean_snr == alone.mean_unclipped == 0
    assert rank_heads([fields], [found]).removal[0] == (0, 1)


def test_saved_and_loaded(model, batches, tmp_path):
    probes = random_probes(model, layer_norm=True)
    names = ["a", "b", "ç", "d"]
    shp = single_head_performance(
        model, probes, batches, pooling="full", bias=True, class_names=names
    )
    path = shp.save(tmp_path / "new" / "shp.npz")
    back = SHP.load(path)
    assert [p.name for p in path.parent.iterdir()] == ["shp.npz"]
    for a, b in zip(shp.matrices, back.matrices, strict=True):
        assert torch.equal(a, b)
    for field in ("block_names", "class_names", "pooling", "bias", "layer_norm"):
        assert getattr(shp, field) == getattr(back, field)


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "foreign"])
def test_damaged_file_is_an_error(model, batches, tmp_path, damage):
    probes = random_probes(model)
    path = single_head_performance(model, probes, batches).save(tmp_path / "shp.npz")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":  # a bit of the first array's data
        content[content.index(b"NUMPY") + 150] ^= 1
        path.write_bytes(content)
    elif damage == "text":
        path.write_text("not an archive")
    else:
        probes.save(path)
    with pytest.raises(ValueError, match=r"shp\.npz"):
        SHP.load(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        SHP.load(tmp_path / "nothing.npz")


def test_bad_input_is_an_error(model, batches):
    probes = random_probes(model)
    with pytest.raises(ValueError, match="unknown pooling 'mean'; choose from head, full"):
        single_head_performance(model, probes, batches, pooling="mean")
    with pytest.raises(ValueError, match="2 class names for 4 classes"):
        single_head_performance(model, probes, batches, class_names=["a", "b"])
    with pytest.raises(ValueError, match="no batches"):
        single_head_performance(model, probes, [])
    with pytest.raises(ValueError, match="labels 0..4 do not fit the model's 4 classes"):
        single_head_performance(model, probes, [(torch.randn(2, 8, 6), torch.tensor([0, 4]))])
    with pytest.raises(ValueError, match="2 images came with labels of shape"):
        single_head_performance(model, probes, [(torch.randn(2, 8, 6), torch.tensor([0]))])
    with pytest.raises(ValueError, match="block 2 are not finite"):
        single_head_performance(model, probes, [(torch.full((1, 8, 6), torch.nan), labels_of(1))])


def test_probes_of_another_model_are_an_error(model, batches):
    probes = random_probes(model)
    model.shapes = ((6, 2), (5, 2))
    with pytest.raises(ValueError, match=r"probes fit blocks .*\(3, 4\).*the model has \[\(6, 2\)"):
        single_head_performance(model, probes, batches)


def test_probes_of_other_classes_are_an_error(model, batches):
    probes = random_probes(model, num_classes=3)
    with pytest.raises(ValueError, match="the model has 4 classes, the probes have 3"):
        single_head_performance(model, probes, batches)


def labels_of(count):
    return torch.zeros(count, dtype=torch.int64)
