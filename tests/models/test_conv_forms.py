"""Convolution blocks in three forms: what they compute, what they cost, equal budgets."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lsmha_fast import create_model
from lsmha_fast.models.budget import conv_block_cost, encoder_block_cost, equal_conv_hidden
from lsmha_fast.nn import ConvBlock, EncoderBlock
from lsmha_fast.nn.blocks import CONV_FORMS

C, N = 256, 256  # of cct_7_3x1_32

# weights by hand: k x k x inputs / groups x outputs of every convolution
WEIGHTS = {
    ("full", None): 9 * C * C,
    ("full", 96): 9 * C * 96 + 9 * 96 * C,
    ("separable", None): 9 * C + C * C,
    ("separable", 96): 9 * C + C * 96 + 96 * C,
    ("bottleneck", None): C * 64 + 9 * 64 * 64 + 64 * C,
    ("bottleneck", 96): C * 96 + 9 * 96 * 96 + 96 * C,
}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def convolution_macs(block, dim=C, tokens=N):
    """Multiply-adds of one image as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        block(torch.empty(1, tokens, dim, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("form, hidden", WEIGHTS)
def test_parameters_and_macs(form, hidden):
    with torch.device("meta"):
        block = ConvBlock(C, form=form, hidden=hidden).eval()
    norms = 2 * sum(conv.out_channels for conv in block.convs)
    weights = WEIGHTS[form, hidden]
    assert parameters(block) == weights + norms == conv_block_cost("params", form, C, N, hidden)
    assert convolution_macs(block) == N * weights == conv_block_cost("macs", form, C, N, hidden)


def test_the_replaced_block_costs_what_the_published_one_does():
    assert encoder_block_cost("params", C, N) == 526_336
    assert encoder_block_cost("macs", C, N) == 167_772_160
    with torch.device("meta"):
        block = EncoderBlock(C, 100, head_dim=4, mlp_ratio=3.0)
    assert parameters(block) == encoder_block_cost("params", C, N, attn_dim=400, mlp_ratio=3.0)


@pytest.mark.parametrize("form, kind", list(itertools.product(CONV_FORMS, ("params", "macs"))))
def test_equal_budget_is_the_nearest_there_is(form, kind):
    target = encoder_block_cost(kind, C, N)
    hidden = equal_conv_hidden(kind, form, C, N)
    gaps = {h: abs(conv_block_cost(kind, form, C, N, h) - target) for h in range(1, 4 * C)}
    if hidden in gaps:
        assert gaps[hidden] == min(gaps.values())
    assert abs(conv_block_cost(kind, form, C, N, hidden) - target) < 0.01 * target


def test_a_budget_below_the_smallest_block_gives_one_channel():
    assert equal_conv_hidden("params", "separable", 8, 4, attn_dim=1, mlp_ratio=0.125) >= 1


@pytest.mark.parametrize("form", CONV_FORMS)
@pytest.mark.parametrize("hidden", [None, 24])
def test_forms_compute_their_convolutions(form, hidden):
    torch.manual_seed(0)
    block = ConvBlock(16, form=form, hidden=hidden, grid=(3, 5)).double().eval()
    x = torch.randn(2, 15, 16, dtype=torch.float64)
    image = x.mT.unflatten(2, (3, 5))
    for conv, norm in zip(block.convs, block.norms, strict=True):
        k = conv.kernel_size[0]
        # convolution as a matrix product over the unfolded image, group by group
        patches = F.unfold(image, k, padding=k // 2).unflatten(1, (conv.groups, -1))
        weight = conv.weight.flatten(1).unflatten(0, (conv.groups, -1))
        image = torch.einsum("goi,bgin->bgon", weight, patches).flatten(1, 2).unflatten(2, (3, 5))
        mean, var = norm.running_mean, norm.running_var
        image = F.gelu((image - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt())
    torch.testing.assert_close(block(x), image.flatten(2).mT)


@pytest.mark.parametrize("form", CONV_FORMS)
def test_models_with_every_form_train(form):
    model = create_model(
        "cct_4_3x2_32",
        10,
        num_heads=8,
        conv_blocks=2,
        conv_form=form,
        conv_hidden="params",
        conv_residual=True,
    )
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters())
    of_blocks = [parameters(block) for block in model.blocks]
    assert of_blocks[0] == of_blocks[1]
    assert abs(of_blocks[0] - of_blocks[3]) < 0.03 * of_blocks[3]


def test_budget_counts_a_free_head_width():
    model = create_model(
        "cct_7_3x1_32", conv_blocks=1, num_heads=100, head_dim=4, conv_hidden="macs"
    )
    hidden = equal_conv_hidden("macs", "full", C, N, attn_dim=400)
    assert (
        model.blocks[0].convs[0].out_channels == hidden != equal_conv_hidden("macs", "full", C, N)
    )


@pytest.mark.parametrize(
    "options, words",
    [
        ({"conv_form": "dense"}, ["full, separable, bottleneck", "dense"]),
        ({"conv_hidden": 0}, ["at least 1", "0"]),
        ({"conv_hidden": "flops"}, ["params, macs", "flops"]),
    ],
)
def test_refused(options, words):
    with pytest.raises(ValueError) as error:
        create_model("cct_2_3x2_32", 10, conv_blocks=1, **options)
    assert all(word in str(error.value) for word in words)
