"""CCT: published sizes, published arithmetic, heads, convolution blocks."""

import math

import pytest
import torch
from torch.nn import functional as F

from lsmha_fast import CCT, create_model
from lsmha_fast.models import from_compact_transformers, parse_name
from lsmha_fast.nn import ConvBlock, EncoderBlock


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "name, num_classes, expected",
    [
        ("cct_7_3x1_32", 100, 3_783_269),
        ("cct_7_3x1_32", 10, 3_760_139),
        ("cct_7_3x1_32_sine", 100, 3_717_733),
        ("cct_7_3x1_32_c100", None, 3_783_269),
    ],
)
def test_parameter_counts_are_the_published_ones(name, num_classes, expected):
    assert count(create_model(name, num_classes)) == expected


# millions, from the table of the published README (10 labels; its 6/3x1 counts no embedding)
@pytest.mark.parametrize(
    "name, millions",
    [
        ("cct_2_3x2_32", 0.284),
        ("cct_4_3x2_32", 0.482),
        ("cct_6_3x1_32_sine", 3.168),
        ("cct_6_3x2_32", 3.327),
        ("cct_7_3x2_32", 3.853),
    ],
)
def test_parameter_counts_agree_with_the_readme_of_cct(name, millions):
    assert round(count(create_model(name, 10)) / 1e6, 3) == millions


@pytest.mark.parametrize("name, classes", [("cct_14_7x2_224", 1000), ("cct_7_7x2_224_sine", 102)])
def test_large_images(name, classes):
    model = create_model(name, classes).eval()
    assert model.grid == (14, 14)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, classes)


def published_state_dict(depth, dim, classes, tokens, hidden, kernel=3, convolutions=1):
    """Random weights under the published names."""
    widths = [3, *[64] * (convolutions - 1), dim]
    state = {}

    def add(name, *shape):
        state[name] = torch.randn(shape, dtype=torch.float64) * 0.3

    for i in range(convolutions):
        add(f"tokenizer.conv_layers.{i}.0.weight", widths[i + 1], widths[i], kernel, kernel)
    add("classifier.positional_emb", 1, tokens, dim)
    for i in range(depth):
        block = f"classifier.blocks.{i}."
        add(block + "self_attn.qkv.weight", 3 * dim, dim)
        add(block + "self_attn.proj.weight", dim, dim)
        add(block + "self_attn.proj.bias", dim)
        add(block + "linear1.weight", hidden, dim)
        add(block + "linear1.bias", hidden)
        add(block + "linear2.weight", dim, hidden)
        add(block + "linear2.bias", dim)
        for norm in ("pre_norm", "norm1"):
            add(block + norm + ".weight", dim)
            add(block + norm + ".bias", dim)
    add("classifier.norm.weight", dim)
    add("classifier.norm.bias", dim)
    add("classifier.attention_pool.weight", 1, dim)
    add("classifier.attention_pool.bias", 1)
    add("classifier.fc.weight", classes, dim)
    add("classifier.fc.bias", classes)
    return state


def published_forward(images, state, depth, num_heads, convolutions):
    """The published network written from its description, on published parameter names."""
    x = images
    for i in range(convolutions):
        x = F.relu(F.conv2d(x, state[f"tokenizer.conv_layers.{i}.0.weight"], padding=1))
        x = F.max_pool2d(x, 3, 2, 1)
    x = x.flatten(2).transpose(1, 2) + state["classifier.positional_emb"]
    dim = x.shape[-1]

    def norm(x, name):
        return F.layer_norm(x, (dim,), state[name + ".weight"], state[name + ".bias"])

    def linear(x, name):
        return F.linear(x, state[name + ".weight"], state.get(name + ".bias"))

    for i in range(depth):
        block = f"classifier.blocks.{i}."
        qkv = linear(norm(x, block + "pre_norm"), block + "self_attn.qkv")
        # consecutive columns belong to a head
        q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        scores = q @ k.mT / math.sqrt(dim // num_heads)
        heads = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(heads, block + "self_attn.proj")
        x = norm(x, block + "norm1")  # replaces the residual stream
        x = x + linear(F.gelu(linear(x, block + "linear1")), block + "linear2")
    x = norm(x, "classifier.norm")
    weights = linear(x, "classifier.attention_pool").softmax(1)
    return linear((weights.mT @ x)[:, 0], "classifier.fc")


@pytest.mark.parametrize("num_heads", [1, 2, 8, 32])
@pytest.mark.parametrize("convolutions", [1, 2])
def test_converted_checkpoint_computes_the_published_network(num_heads, convolutions):
    dim, depth, tokens = 32, 3, {1: 64, 2: 16}[convolutions]
    state = published_state_dict(depth, dim, 11, tokens, 48, convolutions=convolutions)
    model = CCT(
        img_size=16, num_classes=11, dim=dim, depth=depth, num_heads=num_heads, mlp_ratio=1.5,
        num_conv_layers=convolutions,
    ).double()  # fmt: skip
    model.load_state_dict(from_compact_transformers(state))
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    expected = published_forward(images, state, depth, num_heads, convolutions)
    torch.testing.assert_close(model.eval()(images), expected)


def test_conversion_takes_checkpoints_and_refuses_foreign_keys():
    state = published_state_dict(1, 32, 11, 64, 32)
    wrapped = {"state_dict": {"module." + k: v for k, v in state.items()}}
    assert from_compact_transformers(wrapped).keys() == from_compact_transformers(state).keys()
    with pytest.raises(ValueError, match="cls_token"):
        from_compact_transformers({"cls_token": torch.zeros(1)})


def test_forward_with_heads_is_the_same_pass():
    model = create_model("cct_2_3x2_32", 10, num_heads=[4, 16]).eval()
    images = torch.randn(2, 3, 32, 32)
    logits, heads = model.forward_with_heads(images)
    torch.testing.assert_close(logits, model(images))
    assert [tuple(h.shape) for h in heads] == [(2, 64, 4, 32), (2, 64, 16, 8)]
    assert model.block_names == ("block 1", "block 2")


def test_conv_blocks_replace_the_first_blocks():
    model = create_model("cct_4_3x2_32", 10, num_heads=8, conv_blocks=2).eval()
    assert [type(b) for b in model.blocks] == [ConvBlock, ConvBlock, EncoderBlock, EncoderBlock]
    assert model.block_names == ("block 3", "block 4")
    assert len(model.forward_with_heads(torch.randn(2, 3, 32, 32)).heads) == 2


def test_conv_block_is_a_convolution_on_the_token_grid():
    block = ConvBlock(8, residual=True).eval()
    x = torch.randn(2, 12 * 12, 8)
    image = x.mT.unflatten(2, (12, 12)).contiguous()
    expected = image + F.gelu(block.norms[0](F.conv2d(image, block.convs[0].weight, padding=1)))
    torch.testing.assert_close(block(x), expected.flatten(2).mT)
    with pytest.raises(ValueError, match="143 tokens"):
        block(x[:, 1:])


def test_free_head_dim():
    model = create_model("cct_2_3x2_32", 100, num_heads=100, head_dim=4).eval()
    assert model.forward_with_heads(torch.randn(1, 3, 32, 32)).heads[0].shape == (1, 64, 100, 4)


def test_norm_switch_gives_standard_pre_norm():
    block = EncoderBlock(16, 4, pre_norm=True).eval()
    x = torch.randn(2, 5, 16)
    y = x + block.self_attn(block.pre_norm(x), block.pre_norm(x), block.pre_norm(x))[0]
    torch.testing.assert_close(block(x), y + block.mlp(block.norm1(y)))


def test_sine_embedding_is_the_published_one_and_is_not_trained():
    model = create_model("cct_2_3x2_32_sine", 10)
    position, channel = 5, 6
    expected = math.sin(position / 10000 ** (2 * (channel // 2) / 128))
    assert model.positional_emb[0, position, channel].item() == pytest.approx(expected, abs=1e-6)
    assert "positional_emb" not in dict(model.named_parameters())
    assert "positional_emb" in model.state_dict()


def test_published_initialisation_and_stochastic_depth():
    model = create_model("cct_7_3x1_32", 100)
    rates = [block.drop_path.p for block in model.blocks]
    assert rates == pytest.approx([i / 60 for i in range(7)], abs=1e-6)
    assert model.blocks[0].self_attn.in_proj_weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[0].linear1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.positional_emb.std().item() == pytest.approx(0.2, rel=0.02)
    fan_in = 27
    assert model.stem.convs[0].weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
    assert model.blocks[0].self_attn.in_proj_bias is None


def test_drop_path_drops_samples_and_keeps_the_mean():
    from lsmha_fast.nn import DropPath

    out = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    values = out.unique().tolist()
    assert values == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert out.mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(0.25 / 0.75 / 4000))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: create_model("vit_b_16"), ["vit_b_16", "cct_7_3x1_32"]),
        (lambda: create_model("cct_3_3x1_32"), ["depth 3", "2, 4, 6, 7, 14"]),
        (lambda: create_model("cct_7_4x1_32"), ["odd", "4x1"]),
        (lambda: create_model("cct_7_3x1_32", 100, num_heads=100), ["256", "100", "head_dim"]),
        (lambda: create_model("cct_7_3x1_32", 100, num_heads=[4, 8]), ["7 numbers", "[4, 8]"]),
        (lambda: create_model("cct_7_3x1_32", 100, conv_blocks=8), ["0..7", "8"]),
        (lambda: create_model("cct_7_3x1_32", 100, positional_embedding="rope"), ["rope", "sine"]),
        (lambda: create_model("cct_2_3x2_32")(torch.zeros(1, 3, 28, 28)), ["32", "28"]),
    ],
)
def test_bad_sizes_say_what_is_allowed(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words)


def test_names():
    assert parse_name("cct_14_7x2_384_fl")["num_classes"] == 102
    assert parse_name("cct_6_3x2_32_sine") == {
        "depth": 6, "kernel_size": 3, "num_conv_layers": 2, "img_size": 32,
        "positional_embedding": "sine", "dim": 256, "num_heads": 4, "mlp_ratio": 2.0,
    }  # fmt: skip


def test_training_step_compiles_into_one_graph():
    model = create_model("cct_2_3x2_32", 10, num_heads=16, attn_drop=0.0, drop_path=0.0)
    images = torch.randn(2, 3, 32, 32)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = model(images)
    expected_grads = torch.autograd.grad(expected.square().sum(), parameters)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.square().sum(), parameters)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)
