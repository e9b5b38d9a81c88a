"""Connections kept by shared labels, controls of the same size, and exact removal of silence."""

import pytest
import torch

from lsmha_fast import create_model
from lsmha_fast.analysis.connections import (
    afcc_masks,
    andc_masks,
    control_masks,
    masked_model,
    measure_nodes,
    recognized_labels,
    shared_labels,
)
from lsmha_fast.models import drop_silent

K = 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("cct_2_3x2_32", K, 8, head_dim=2, mlp_hidden=6).eval()


def random_labels(share):
    sizes = {"head_nodes": 16, "mlp_in": 128, "mlp": 6, "block": 128}
    found = {kind: [torch.rand(size, K) < share for _ in range(2)] for kind, size in sizes.items()}
    return {**found, "final": [torch.rand(128, K) < share]}


def test_nodes_of_every_kind_from_one_pass(model):
    data = [(torch.randn(6, 3, 32, 32), torch.arange(6) % K)]
    passes = []
    hook = model.stem.register_forward_hook(lambda *_: passes.append(1))
    snp = measure_nodes(model, data, data, epochs=2)
    hook.remove()
    assert len(passes) == 1 + 1 + 1  # the first batch, the cached features, the measurement
    recognized = recognized_labels(snp, threshold=0.9)
    shapes = {kind: [tuple(t.shape) for t in found] for kind, found in recognized.items()}
    assert shapes == {
        "head_nodes": [(16, K)] * 2, "mlp_in": [(128, K)] * 2, "mlp": [(6, K)] * 2,
        "block": [(128, K)] * 2, "final": [(128, K)],
    }  # fmt: skip
    # the model's own readout: with all channels alive the fields are its mean logits
    with torch.no_grad():
        pooled = model.pool(model.norm(model.blocks[1](model.blocks[0](model.embed(data[0][0])))))
        assert torch.allclose(model.fc(pooled), model(data[0][0]), atol=1e-6)
    assert torch.equal(snp.fc_weight[-1][:, :, 0], model.fc.weight.detach())


def test_shared_labels_by_hand():
    inputs = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    outputs = torch.tensor([[1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert shared_labels(inputs, outputs).tolist() == [[True, True, False], [False, True, False]]


def test_afcc_joins_nodes_with_a_common_label(model):
    recognized = random_labels(0.3)
    masks = afcc_masks(model, recognized)
    assert len(masks) == 6
    for name, mask in masks.items():
        assert mask.shape == model.get_parameter(name).shape
    a, b = recognized["mlp"][1][4], recognized["block"][1][77]
    assert masks["blocks.1.linear2.weight"][77, 4] == (a & b).any()
    everything = {kind: [torch.ones_like(t) for t in found] for kind, found in recognized.items()}
    assert all(mask.all() for mask in afcc_masks(model, everything).values())


def test_andc_keeps_the_diagonal(model):
    recognized = random_labels(0.3)
    masks = andc_masks(model, recognized)
    assert torch.equal(masks["fc.weight"], recognized["final"][0].T)
    silent = ~recognized["mlp"][0].any(1)
    assert torch.equal(masks["blocks.0.linear2.weight"].all(0), ~silent)
    assert not masks["blocks.0.linear2.weight"][:, silent].any()


@pytest.mark.parametrize("rule", [afcc_masks, andc_masks])
@pytest.mark.parametrize("seed", [None, 0])
def test_controls_remove_as_many_of_every_matrix(model, rule, seed):
    masks = rule(model, random_labels(0.2))
    controls = control_masks(model, masks, seed)
    assert controls.keys() == masks.keys()
    for name, mask in masks.items():
        assert int(controls[name].sum()) == int(mask.sum())
        if seed is None and not bool((mask == mask[:1]).all()):
            weight = model.get_parameter(name).abs()
            assert weight[controls[name]].min() >= weight[~controls[name]].max()


def test_what_is_silent_is_removed_exactly(model):
    masks = andc_masks(model, random_labels(0.15))
    masks["blocks.1.self_attn.out_proj.weight"][:] = False  # a block that loses all its heads
    masks["blocks.0.self_attn.out_proj.weight"][:, 4:10] = False
    masked = masked_model(model, masks)
    small = drop_silent(masked)
    assert small.blocks[1].self_attn.num_heads == 1
    assert small.blocks[0].self_attn.num_heads <= 5
    assert small.blocks[0].linear1.out_features < 6
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(small(images), masked(images))
        assert not torch.equal(masked(images), model(images))


def test_masks_of_another_model_are_refused(model):
    with pytest.raises(ValueError, match=r"fc\.weight: a mask \(2, 2\) for \(3, 128\)"):
        masked_model(model, {"fc.weight": torch.ones(2, 2, dtype=torch.bool)})
