"""Every folding by itself against the unfolded layers, and whole models against the eager ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lsmha_fast import create_model
from lsmha_fast.deploy import fold, optimize
from lsmha_fast.deploy.layers import packing_missing
from lsmha_fast.deploy.native import NativeEncoder
from lsmha_fast.nn import ConvBlock, EncoderBlock, LSMultiHeadAttention, SeqPool
from lsmha_fast.testing import assert_no_worse

MEAN, STD = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)
SMALL = {"dim": 32, "depth": 3, "num_heads": 8, "attn_drop": 0.1}
# every form of block and stem that create_model makes
MODELS = {
    "published block": {},
    "pre-norm": {"pre_norm": True},
    "heads per block": {"num_heads": [4, 16, 32]},
    "heads with a width of their own": {"num_heads": 5, "head_dim": 3},
    "sine": {"positional_embedding": "sine"},
    "no embedding": {"positional_embedding": "none"},
    "two convolutions in the stem": {"num_conv_layers": 2},
    "7 x 7 stem": {"kernel_size": 7, "num_conv_layers": 2},
    "full": {"conv_blocks": 2},
    "residual": {"conv_blocks": 1, "conv_residual": True},
    "separable": {"conv_blocks": 2, "conv_form": "separable"},
    "bottleneck": {"conv_blocks": 2, "conv_form": "bottleneck", "pre_norm": True},
}


def randomise(model):
    """Parameters and statistics that no folding leaves alone."""
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, LSMultiHeadAttention):
            nn.init.normal_(module.in_proj_weight, std=2 * module.embed_dim**-0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
    return model.eval()


def make(options=None):
    return randomise(create_model("cct_2_3x1_32", 10, **{**SMALL, **(options or {})}))


def exact(affine, x):
    return F.linear(x, affine.weight, affine.bias)


def test_batch_norm_goes_into_the_convolution():
    block = randomise(ConvBlock(6)).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    weight, bias = fold.batch_norm_into_conv(block.convs[0], block.norms[0])
    expected = block.norms[0](block.convs[0](x))
    torch.testing.assert_close(F.conv2d(x, weight, bias, padding=1), expected)


def test_batch_norm_without_statistics_is_refused():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match="without running statistics"):
        fold.batch_norm_into_conv(nn.Conv2d(4, 4, 3), norm)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_goes_into_the_linear_map_behind_it(bias):
    norm, linear = nn.LayerNorm(7).double(), nn.Linear(7, 5, bias=bias).double()
    randomise(norm)
    x = torch.randn(3, 7, dtype=torch.float64)
    folded = fold.norm_into_linear(norm, fold.affine_of(linear))
    torch.testing.assert_close(exact(folded, F.layer_norm(x, (7,))), linear(norm(x)))


def test_softmax_scale_goes_into_the_query_bit_for_bit_where_it_is_a_power_of_two():
    attn = LSMultiHeadAttention(32, 8, batch_first=True, backend="reference")  # D = 4: 1 / 2
    x = torch.randn(2, 9, 32)
    folded = copy.deepcopy(attn)
    scaled = fold.scale_into_query(fold.Affine(attn.in_proj_weight.double(), None), 4)
    folded.in_proj_weight.data.copy_(scaled.weight)
    q = x @ folded.in_proj_weight[:32].T
    assert torch.equal(q, 0.5 * (x @ attn.in_proj_weight[:32].T))
    assert torch.equal(folded.in_proj_weight[32:], attn.in_proj_weight[32:])


def test_final_norm_goes_through_the_pooling_into_the_classifier():
    norm, pool, fc = nn.LayerNorm(12), SeqPool(12, backend="reference"), nn.Linear(12, 5)
    for module in (norm, pool, fc):
        randomise(module.double())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    scores, affine = fold.norm_into_classifier(norm, pool, fc)
    plain = F.layer_norm(x, (12,))
    p = torch.softmax(plain @ scores[0], 1)
    pooled = torch.einsum("bn,bnc->bc", p, plain)
    torch.testing.assert_close(exact(affine, pooled), fc(pool(norm(x))))


def test_bytes_go_into_the_stem_exactly_at_the_borders():
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False).double()
    images = torch.randint(256, (2, 3, 6, 5), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    weight, bias = fold.input_into_stem(fold.affine_of(conv), MEAN, STD)
    with_ones = F.pad(images, (0, 0, 0, 0, 0, 1), value=1).double()
    expected = conv((images.double() / 255 - mean) / std)
    torch.testing.assert_close(F.conv2d(with_ones, weight, bias, padding=1), expected)
    # the mean in the bias alone would be wrong there, and only there
    naive_bias = weight[:, 3].sum((1, 2))
    naive = F.conv2d(images.double(), weight[:, :3], naive_bias, padding=1)
    wrong = ~torch.isclose(naive, expected).all(1)[0]
    inside = wrong[1:-1, 1:-1]
    assert wrong.sum() - inside.sum() == 18
    assert not inside.any()


def test_silent_heads_are_left_out():
    attn = randomise(EncoderBlock(24, 6)).self_attn
    with torch.no_grad():
        attn.out_proj.weight.view(24, 6, 4)[:, [1, 4]] = 0
    qkv, proj, num_heads = fold.without_silent_heads(attn)
    assert (num_heads, qkv.weight.shape, proj.weight.shape) == (4, (48, 24), (24, 16))
    model = make()
    with torch.no_grad():
        model.blocks[1].self_attn.out_proj.weight.view(32, 8, 4)[:, [0, 3, 7]] = 0
        model.blocks[2].self_attn.out_proj.weight.zero_()
    images = torch.randn(2, 3, 32, 32)
    form = optimize(model, images)
    assert [block.num_heads for block in form.blocks] == [8, 5, 1]
    check(form, model, images)


def check(form, model, images, low=None):
    """The error rule: no more than twice as far from fp64 as the eager model is."""
    normalised = images
    if images.dtype == torch.uint8:
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        normalised = (images / 255 - mean) / std
    with torch.no_grad():
        high = copy.deepcopy(model).double()(normalised.double())
        eager = model if low is None else low
        dtype = eager.fc.weight.dtype
        assert_no_worse(form(images).to(dtype), eager(normalised.to(dtype)), high)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("name", MODELS)
def test_optimised_model_is_no_worse_than_eager(name, packed):
    model, images = make(MODELS[name]), torch.randn(3, 3, 32, 32)
    check(optimize(model, images, packed=packed), model, images)


@pytest.mark.parametrize("name", ["published block", "pre-norm", "bottleneck"])
def test_blocks_whose_attention_has_another_backend_are_packed_for_onednn(name):
    model, images = make({**MODELS[name], "backend": "reference"}), torch.randn(3, 3, 32, 32)
    form = optimize(model, images)
    assert not any(isinstance(block, NativeEncoder) for block in form.blocks)
    check(form, model, images)


@pytest.mark.parametrize("name", ["published block", "7 x 7 stem", "separable"])
def test_bytes(name):
    model, images = make(MODELS[name]), torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    check(optimize(model, images, mean=MEAN, std=STD), model, images)


@pytest.mark.skipif(packing_missing(torch.bfloat16) is not None, reason="no bfloat16 products")
@pytest.mark.parametrize("name", ["published block", "pre-norm", "full", "bottleneck"])
@pytest.mark.parametrize("bytes_in", [False, True])
def test_bfloat16(name, bytes_in):
    model = make(MODELS[name])
    low = copy.deepcopy(model).bfloat16()
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    normalisation = {"mean": MEAN, "std": STD} if bytes_in else {}
    if not bytes_in:
        images = torch.randn(16, 3, 32, 32).bfloat16().float()
    form = optimize(model, images, dtype=torch.bfloat16, **normalisation)
    check(form, model, images, low)


def test_the_model_is_left_as_it_was_and_batches_of_any_size_run():
    model, images = make(), torch.randn(5, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    form = optimize(model, images[:1])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in form.parameters())
    out = form(images)
    assert out.shape == (5, 10)
    torch.testing.assert_close(out[3:], form(images[3:]))
    assert form(images[:0]).shape == (0, 10)


def test_bad_input_is_one_clear_error():
    model, images = make(), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="expected a CCT, got Linear"):
        optimize(nn.Linear(3, 3), images)
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\).*\(1, 3, 16, 16\)"):
        optimize(model, images[..., ::2, ::2])
    with pytest.raises(ValueError, match="uint8"):
        optimize(model, images, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="go together"):
        optimize(model, images, mean=MEAN)
    with pytest.raises(ValueError, match="3 channels"):
        optimize(model, images.byte(), mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="float16 needs a GPU"):
        optimize(model, images, dtype=torch.float16)
    with pytest.raises(ValueError, match="int8"):
        optimize(model, images, dtype=torch.int8)
