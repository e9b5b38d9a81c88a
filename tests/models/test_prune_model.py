"""A pruned CCT is an ordinary CCT: made by `create_model` from lists, loaded as any other."""

import pytest
import torch

from lsmha_fast import create_model
from lsmha_fast.models import prune_model


def test_pruned_model_is_made_by_name_too():
    model = create_model("cct_4_3x2_32", 10, (8, 16, 4), conv_blocks=1).eval()
    small = prune_model(
        model, heads=[[1, 5], [15], None], hidden=[None, [0, 127, 3], list(range(64))]
    )
    again = create_model(
        "cct_4_3x2_32", 10, (2, 1, 4), head_dim=(16, 8, 32), conv_blocks=1,
        mlp_hidden=(128, 3, 64),
    ).eval()  # fmt: skip
    again.load_state_dict(small.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), small(images))
        logits, heads = small.forward_with_heads(images)
    assert [tuple(x.shape[2:]) for x in heads] == [(2, 16), (1, 8), (4, 32)]
    assert not small.training
    assert model.blocks[1].self_attn.num_heads == 8


def test_silenced_heads_and_pruned_model_agree():
    model = create_model("cct_2_3x2_32", 10, 16).double().eval()
    kept = [[0, 2, 7], [9]]
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        small = prune_model(model, heads=kept)(images)
        for block, heads in zip(model.blocks, kept, strict=True):
            weight = block.self_attn.out_proj.weight.view(128, 16, 8)
            weight[:, [h for h in range(16) if h not in heads]] = 0
        torch.testing.assert_close(small, model(images))


def test_bad_input_is_an_error():
    model = create_model("cct_2_3x2_32", 10, 4)
    with pytest.raises(ValueError, match="heads: 1 entries for 2 transformer blocks"):
        prune_model(model, heads=[[0]])
    with pytest.raises(ValueError, match=r"numbers 0\.\.3; got \[4\]"):
        prune_model(model, heads=[[4], [0]])
    with pytest.raises(ValueError, match="head_dim must be one number, or 2 numbers"):
        create_model("cct_2_3x2_32", 10, 4, head_dim=(2, 2, 2))
    with pytest.raises(ValueError, match="at least 1 hidden channel, got 0"):
        create_model("cct_2_3x2_32", 10, 4, mlp_hidden=0)
