"""Heads of models that others wrote, and single nodes, against what their modules compute."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lsmha_fast import create_model, replace_attention
from lsmha_fast.analysis import UnitView, single_head_performance, train_probes

K = 3


class Encoder(nn.Module):
    """nn.TransformerEncoder on patches, with mean pooling."""

    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 4, 12, 0.1, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.batch_first = batch_first
        self.fc = nn.Linear(8, K)

    def forward(self, images):
        x = images.flatten(2)[:, :, :40].unflatten(2, (5, 8)).flatten(1, 2)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x)
        return self.fc(x.mean(1 if self.batch_first else 0))


def timm_vit():
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "depth": 2, "num_heads": 3}
    return timm.models.VisionTransformer(**sizes, num_classes=K, global_pool="token")


def timm_mean():
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "depth": 2, "num_heads": 3}
    return timm.models.VisionTransformer(
        **sizes, num_classes=K, global_pool="avg", class_token=False, qk_norm=True
    )


def torchvision_vit():
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=3, hidden_dim=12, mlp_dim=20,
        num_classes=K,
    )  # fmt: skip


def vit_pytorch():
    vit = pytest.importorskip("vit_pytorch")
    return vit.ViT(image_size=32, patch_size=16, num_classes=K, dim=12, depth=2, heads=3,
                   dim_head=4, mlp_dim=20)  # fmt: skip


MODELS = {
    "timm": (timm_vit, (5, 3, 4), 48),
    "timm-mean": (timm_mean, (4, 3, 4), 48),
    "torchvision": (torchvision_vit, (5, 3, 4), 20),
    "vit-pytorch": (vit_pytorch, (5, 3, 4), 20),
    "encoder": (lambda: Encoder(True), (15, 4, 2), 12),
    "encoder-tokens-first": (lambda: Encoder(False), (15, 4, 2), 12),
}


def batches(sizes=(6, 3)):
    return [(torch.randn(n, 3, 32, 32), torch.arange(n) % K) for n in sizes]


@pytest.mark.parametrize("name", MODELS)
def test_probes_shp_and_snp_of_foreign_models(name):
    make, (N, H, D), hidden = MODELS[name]
    model = make()
    assert len(replace_attention(model)) == 2
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    data = batches()
    probes = train_probes(model, data, val_batches=data, epochs=2)
    shp = single_head_performance(model, probes, data)
    assert [tuple(m.shape) for m in shp.matrices] == [(H, K, K)] * 2
    assert shp.counts.tolist() == [3, 3, 3]
    view = UnitView(model, "heads", "head_nodes", "mlp").eval()
    with torch.no_grad():
        logits, units = view.forward_with_heads(data[0][0])
        assert torch.equal(logits, model(data[0][0]))
    shapes = [(6, N, H, D)] * 2 + [(6, N, H * D, 1)] * 2 + [(6, N, hidden, 1)] * 2
    assert [tuple(x.shape) for x in units] == shapes
    assert torch.equal(units[0].flatten(2), units[2].flatten(2))
    nodes = train_probes(view, data, epochs=1)
    assert single_head_performance(view, nodes, data).matrix(5).shape == (hidden, K, K)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_units_of_a_cct_are_what_its_modules_compute():
    model = create_model("cct_2_3x2_32", K, 16).eval()
    images = batches()[0][0]
    view = UnitView(model, "heads", "mlp_in", "mlp", "block", "final")
    assert view.block_names[:3] == ("block 1 heads", "block 2 heads", "block 1 mlp_in")
    with torch.no_grad():
        logits, heads = model.forward_with_heads(images)
        seen, units = view.forward_with_heads(images)
        assert torch.equal(seen, logits)
        for mine, theirs in zip(units[:2], heads, strict=True):
            assert torch.equal(mine, theirs)
        first = model.blocks[0]
        entering = units[2].flatten(2)
        assert torch.equal(units[4].flatten(2), F.gelu(first.linear1(entering)))
        assert torch.equal(units[6].flatten(2), first(model.embed(images)))
        assert torch.equal(units[8].flatten(2), model.norm(units[7].flatten(2)))


def test_snp_equals_silencing_every_other_node():
    model = create_model("cct_2_3x2_32", K, 4, mlp_hidden=5).eval()
    view, data = UnitView(model, "mlp"), batches()
    probes = train_probes(view, data, epochs=2)
    snp = single_head_performance(view, probes, data)
    labels = torch.cat([y for _, y in data])
    with torch.no_grad():
        hidden = torch.cat([view.forward_with_heads(x)[1][1] for x, _ in data])  # (9, N, 5, 1)
    for node in range(5):
        alone = torch.zeros_like(hidden)
        alone[:, :, node] = hidden[:, :, node]
        pool, fc, bias = probes.blocks[1]
        weights = torch.softmax(alone.flatten(2) @ pool.flatten(), dim=1)
        fields = torch.einsum("bn,bnc->bc", weights, alone.flatten(2)) @ fc.flatten(1).T
        naive = torch.stack([fields[labels == k].mean(0) for k in range(K)])
        torch.testing.assert_close(snp.matrix(1)[node], naive, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match=r"Encoder has no forward_with_heads.*replace_attention"):
        train_probes(Encoder(True), batches())
    with pytest.raises(ValueError, match="unknown units 'neurons'; choose from heads"):
        UnitView(Encoder(True), "neurons")
    with pytest.raises(ValueError, match="Encoder has no block units"):
        UnitView(Encoder(True), "block")
    model = Encoder(True)
    replace_attention(model)
    layers = model.encoder.layers
    layers[1] = layers[0]
    with pytest.raises(ValueError, match="block 1 runs twice"):
        UnitView(model, "heads").forward_with_heads(batches()[0][0])


def test_windows_are_refused():
    timm = pytest.importorskip("timm")
    model = timm.models.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1,), num_heads=(2,),
        num_classes=K,
    )  # fmt: skip
    replace_attention(model)
    with pytest.raises(ValueError, match="attention in windows cannot be measured"):
        train_probes(model, batches())
