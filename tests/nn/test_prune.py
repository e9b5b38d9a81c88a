"""Pruned modules compute what the whole ones compute with the removed parts silenced."""

import pytest
import torch

from lsmha_fast import EncoderBlock, LSMultiHeadAttention
from lsmha_fast.nn import prune_heads, prune_hidden
from lsmha_fast.testing import assert_no_worse

KEPT = [4, 0, 5]


def silenced(module, x):
    """What `module` gives with factor 0 for the heads that are not in KEPT."""
    scale = torch.zeros(module.num_heads, dtype=x.dtype)
    scale[KEPT] = 1
    return module.project(module.heads(x, head_scale=scale))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head_dim", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_head_scale_zero(bias, head_dim, dtype):
    module = LSMultiHeadAttention(24, 6, bias=bias, head_dim=head_dim, batch_first=True).to(dtype)
    x = torch.randn(3, 17, 24, dtype=dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.4)
        small = prune_heads(module, KEPT)
        actual, low = small.project(small.heads(x)), silenced(module, x)
        high = silenced(module.double(), x.double())
    assert_no_worse(actual, low, high)
    assert small.num_heads == 3
    assert small.head_dim == module.head_dim
    assert small.in_proj_weight.shape == (9 * module.head_dim, 24)


def test_gradients_of_what_is_left_are_the_same():
    module = LSMultiHeadAttention(24, 6, batch_first=True).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    small = prune_heads(module, KEPT)
    small.project(small.heads(x)).sum().backward()
    silenced(module, x).sum().backward()
    rows = torch.cat([torch.arange(4 * h, 4 * h + 4) for h in KEPT])
    expected = module.in_proj_weight.grad.view(3, 24, 24)[:, rows].flatten(0, 1)
    torch.testing.assert_close(small.in_proj_weight.grad, expected)


def test_every_option_of_the_module_is_kept():
    module = LSMultiHeadAttention(
        24, 6, 0.3, add_bias_kv=True, add_zero_attn=True, kdim=10, vdim=7, backend="reference"
    ).eval()  # fmt: skip
    module.out_proj.weight.requires_grad_(False)
    small = prune_heads(module, KEPT)
    for name in ("dropout", "add_zero_attn", "kdim", "vdim", "batch_first", "backend", "training"):
        assert getattr(small, name) == getattr(module, name)
    assert not small.out_proj.weight.requires_grad
    with torch.no_grad():  # silence by zero columns, since kdim allows no heads(x)
        columns = torch.arange(24).view(6, 4)[[h for h in range(6) if h not in KEPT]].flatten()
        q, k, v = torch.randn(5, 2, 24), torch.randn(9, 2, 10), torch.randn(9, 2, 7)
        pruned = small(q, k, v)[0]
        module.out_proj.weight[:, columns] = 0
        torch.testing.assert_close(pruned, module(q, k, v)[0])


def test_hidden_nodes_equal_zeroed_columns():
    block = EncoderBlock(8, 2, mlp_ratio=3)
    kept = [20, 3, 4]
    block.linear1, block.linear2 = before = (block.linear1, block.linear2)
    narrow = prune_hidden(block, kept)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        gone = [f for f in range(24) if f not in kept]
        before[1].weight[:, gone] = 0
        expected = block.mlp(x)
        block.linear1, block.linear2 = narrow
        torch.testing.assert_close(block.mlp(x), expected)
    assert narrow[0].weight.shape == (3, 8)


@pytest.mark.parametrize("kept", [[], [0, 0], [6], [-1]])
def test_bad_numbers_are_an_error(kept):
    with pytest.raises(ValueError, match=r"at least one head, each once, of the numbers 0\.\.5"):
        prune_heads(LSMultiHeadAttention(24, 6), kept)
    with pytest.raises(ValueError, match=r"at least one hidden node.*0\.\.5"):
        prune_hidden(EncoderBlock(6, 2, mlp_ratio=1), kept)
