"""Heads of models of other libraries: those that the model itself projects, nothing changed."""

import pytest
import torch
from torch import nn

from lsmha_fast import replace_attention
from lsmha_fast.analysis import (
    WithHeads,
    find_clusters,
    single_head_performance,
    train_probes,
)

timm = pytest.importorskip("timm")
OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4}


def vit(**options):
    options = {**OPTIONS, "num_classes": 5, **options}
    return timm.models.vision_transformer.VisionTransformer(**options).eval()


@pytest.mark.parametrize("pool, tokens", [("token", 17), ("avg", 16)])
@pytest.mark.parametrize("swap", [False, True])
def test_heads_are_what_the_model_projects(pool, tokens, swap):
    plain = vit(global_pool=pool, class_token=pool == "token")
    images, outputs = torch.randn(2, 3, 32, 32), []
    expected = plain(images)
    if swap:
        assert len(replace_attention(plain)) == 3
    for block in plain.blocks:
        block.attn.register_forward_hook(lambda _, __, out: outputs.append(out))
    model = WithHeads(plain)
    logits, heads = model.forward_with_heads(images)
    assert model.block_names == ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn")
    torch.testing.assert_close(logits, expected)
    assert [h.shape for h in heads] == [(2, tokens, 4, 6)] * 3
    for block, h, out in zip(plain.blocks, heads, outputs, strict=True):
        torch.testing.assert_close(block.attn.proj(h.flatten(-2)), out)
    assert not any(m._forward_pre_hooks for m in plain.modules())
    assert torch.equal(model(images), plain(images))


def test_all_heads_together_are_the_probe():
    torch.manual_seed(0)
    model = WithHeads(vit())
    labels = torch.arange(40) % 5
    batches = [(torch.randn(40, 3, 32, 32) + labels[:, None, None, None], labels)]
    probes = train_probes(model, batches, val_batches=batches, epochs=15, lr=0.03)
    assert max(probes.accuracy) > 0.5  # one in five by chance
    shp = single_head_performance(model, probes, batches, pooling="full")
    heads = model.forward_with_heads(batches[0][0]).heads
    for m, probe in enumerate(probes.blocks):
        x = heads[m].flatten(2)
        p = (x @ probe.pool_weight.flatten()).softmax(1)
        fields = torch.einsum("bn,bnc->bc", p, x) @ probe.fc_weight.flatten(1).T
        means = torch.stack([fields[labels == k].mean(0) for k in range(5)])
        torch.testing.assert_close(shp.matrix(m).sum(0), means, rtol=1e-4, atol=1e-4)
        assert find_clusters(shp.matrix(m)).number.shape == (4,)


class Torch(nn.Module):
    """Torch's own encoder over tokens, without its output projection being called."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(24, 5)

    def forward(self, images):
        return self.fc(self.encoder(images).mean(1))


def test_torch_attention_after_the_swap():
    tokens, plain = torch.randn(2, 7, 24), Torch().eval()
    with pytest.raises(ValueError, match=r"called 0 times.*replace_attention"):
        WithHeads(plain).forward_with_heads(tokens)
    expected = plain(tokens)
    replace_attention(plain)
    logits, heads = WithHeads(plain).forward_with_heads(tokens)
    torch.testing.assert_close(logits, expected)
    assert [h.shape for h in heads] == [(2, 7, 4, 6)] * 2


def test_vit_pytorch():
    vit_pytorch = pytest.importorskip("vit_pytorch")
    plain = vit_pytorch.ViT(
        image_size=32, patch_size=8, num_classes=5, dim=24, depth=2, heads=3, mlp_dim=16, dim_head=4
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    logits, heads = WithHeads(plain).forward_with_heads(images)
    assert torch.equal(logits, plain(images))
    assert [h.shape for h in heads] == [(2, 17, 3, 4)] * 2


def test_what_has_no_such_heads_is_refused():
    with pytest.raises(ValueError, match="ResNet has no attention module"):
        WithHeads(timm.create_model("resnet10t", num_classes=5))
    swin = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(1,), num_heads=(2,)
    ).eval()
    with pytest.raises(ValueError, match="attention within windows has no such heads"):
        WithHeads(swin).forward_with_heads(torch.randn(2, 3, 32, 32))
