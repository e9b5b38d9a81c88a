"""What `lsmha committee` counts as one architecture."""

from dataclasses import replace

import pytest

from lsmha_fast._committee_command import architecture
from lsmha_fast.train import TrainConfig

BASE = TrainConfig(num_heads=16, conv_blocks=1)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "cct_7_3x1_32"},
        {"num_heads": (16, 8)},
        {"head_dim": 4},
        {"conv_blocks": 2},
        {"conv_form": "separable"},
        {"conv_hidden": 64},
        {"conv_residual": True},
        {"dim": 64},
        {"depth": 3},
        {"mlp_hidden": 100},
        {"positional_embedding": "sine"},
        {"pre_norm": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_makes_another_architecture(change):
    assert architecture(replace(BASE, **change)) != architecture(BASE)


@pytest.mark.parametrize("change", [{"seed": 1}, {"lr": 1e-4}, {"epochs": 3}, {"attn_drop": 0.0}])
def test_what_does_not(change):
    assert architecture(replace(BASE, **change)) == architecture(BASE)
    assert architecture(BASE) == "cct_2_3x2_32 16 heads after 1 full convolutions"
