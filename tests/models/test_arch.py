"""Costs against the published counts of cct_7_3x1_32, and against the budgets of hybrids."""

import pytest
import torch

from lsmha_fast import create_model
from lsmha_fast.analysis import count_macs
from lsmha_fast.models.arch import model_costs
from lsmha_fast.models.budget import conv_block_cost, encoder_block_cost


def test_published_model():
    costs = {row.name.partition(":")[0]: row for row in model_costs(create_model("cct_7_3x1_32"))}
    block = costs["block 3"]
    assert block.macs == encoder_block_cost("macs", 256, 256) == 167_772_160
    assert (block.params, block.exps) == (526_336, 4 * 256**2)
    assert costs["stem"].macs == 7_077_888
    assert costs["total"].params == 3_783_269
    assert costs["total"].macs == 7 * block.macs + costs["stem"].macs + costs["head"].macs
    assert costs["total"].steps == 2 + 7 * 9 + 5


@pytest.mark.parametrize("form", ["full", "separable", "bottleneck"])
def test_convolution_blocks(form):
    model = create_model("cct_7_3x1_32", num_heads=64, conv_blocks=2, conv_form=form)
    rows = model_costs(model)
    assert [r.steps for r in rows[1:4]] == [
        {"full": 1, "separable": 2, "bottleneck": 3}[form]
    ] * 2 + [9]
    assert rows[1].macs == conv_block_cost("macs", form, 256, 256)
    assert rows[1].params == conv_block_cost("params", form, 256, 256)
    assert rows[1].exps == 0
    assert rows[-1].params == sum(p.numel() for p in model.parameters())


def test_a_full_convolution_costs_nine_tenths_of_a_transformer_block():
    ratio = conv_block_cost("macs", "full", 256, 256) / encoder_block_cost("macs", 256, 256)
    assert ratio == pytest.approx(0.9)


@pytest.mark.parametrize("conv_blocks", [0, 2])
def test_multiply_adds_are_those_that_a_pass_computes(conv_blocks):
    model = create_model(
        "cct_4_3x2_32", 10, [8, 16, 4, 2][conv_blocks:], 4, conv_blocks, conv_form="separable"
    )
    image = torch.zeros(1, 3, 32, 32)
    assert model_costs(model)[-1].macs == count_macs(model, image)
