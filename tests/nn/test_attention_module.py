"""LSMultiHeadAttention against torch.nn.MultiheadAttention with the same weights."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lsmha_fast import LSMultiHeadAttention


def pair(embed_dim=16, num_heads=4, **kwargs):
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(embed_dim, num_heads, **kwargs).double()
    ours = LSMultiHeadAttention(embed_dim, num_heads, **kwargs).double()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def masks(name, B, L, S, H):
    causal = torch.ones(L, S).triu(1).bool()
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, -2:] = True
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(B, S).double()},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": torch.randn(L, S).double()},
        "per head": {"attn_mask": torch.randn(B * H, L, S).double()},
        "both": {"key_padding_mask": padding, "attn_mask": torch.randn(L, S).double()},
        "causal": {"attn_mask": causal, "is_causal": True},
    }[name]


@pytest.mark.parametrize(
    "mask", ["none", "padding", "float padding", "bool", "float", "per head", "both", "causal"]
)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_equals_torch(mask, need_weights, batch_first):
    theirs, ours = pair(batch_first=batch_first)
    B, N, H = 3, 7, 4
    x = torch.randn(B, N, 16).double()
    x = x if batch_first else x.transpose(0, 1)
    kwargs = masks(mask, B, N, N, H)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = []
    for module, given in zip((theirs, ours), inputs, strict=True):
        # torch refuses is_causal with weights unless the mask is used
        out, weights = module(given, given, given, need_weights=need_weights, **kwargs)
        out.square().sum().backward()
        results.append((out, weights))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    assert (results[1][1] is None) == (not need_weights)
    if need_weights:
        torch.testing.assert_close(results[1][1], results[0][1])
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize(
    "options",
    [{}, {"kdim": 6, "vdim": 10}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": False}],
)
@pytest.mark.parametrize("average", [True, False])
def test_cross_attention_equals_torch(options, average):
    theirs, ours = pair(batch_first=True, **options)
    q = torch.randn(2, 5, 16).double()
    k = torch.randn(2, 9, options.get("kdim", 16)).double()
    v = torch.randn(2, 9, options.get("vdim", 16)).double()
    for kwargs in (masks("none", 2, 5, 9, 4), masks("both", 2, 5, 9, 4)):
        expected = theirs(q, k, v, average_attn_weights=average, **kwargs)
        actual = ours(q, k, v, average_attn_weights=average, **kwargs)
        torch.testing.assert_close(actual, expected)


def test_unbatched_equals_torch():
    theirs, ours = pair()
    x = torch.randn(7, 16).double()
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))


@pytest.mark.parametrize("kwargs", [{}, {"kdim": 3, "vdim": 5}, {"add_bias_kv": True}])
def test_state_dict_keys_are_torchs(kwargs):
    theirs, ours = pair(**kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_fully_masked_sample_gives_zero_attention():
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 5, 16).double()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1] = True
    for need_weights in (True, False):
        out, _ = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        torch.testing.assert_close(out[1], ours.out_proj.bias.expand(5, 16))


def test_encoder_layer_calls_our_forward_in_eval_mode():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    expected_layer = copy.deepcopy(layer)
    ours = LSMultiHeadAttention(16, 4, batch_first=True)
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours.eval()
    calls = []
    ours.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected_layer(x))
    assert calls == [1]


def test_heads_then_project_is_forward():
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 6, 16).double()
    heads = ours.heads(x)
    assert heads.shape == (2, 6, 4, 4)
    torch.testing.assert_close(ours.project(heads), ours(x, x, x)[0])


def test_head_scale_silences_a_head():
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 6, 16).double()
    scale = torch.tensor([1.0, 0.0, 2.0, 1.0]).double()
    expected = ours.heads(x) * scale[:, None]
    torch.testing.assert_close(ours.heads(x, head_scale=scale), expected)


def test_free_head_dim_and_qkv_bias():
    module = LSMultiHeadAttention(16, 5, head_dim=3, qkv_bias=False, batch_first=True)
    assert module.in_proj_weight.shape == (45, 16)
    assert module.out_proj.weight.shape == (16, 15)
    assert module.in_proj_bias is None
    assert module.out_proj.bias is not None
    x = torch.randn(2, 6, 16)
    assert module(x, x, x)[0].shape == (2, 6, 16)


def test_dropout_acts_only_in_training():
    module = LSMultiHeadAttention(16, 4, 0.5, batch_first=True)
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        trained = [module.train().heads(x) for _ in range(2)]
        measured = [module.eval().heads(x) for _ in range(2)]
    assert not torch.equal(*trained)
    assert torch.equal(*measured)


@pytest.mark.parametrize("size", [(0, 5), (2, 0)])
def test_empty_inputs(size):
    _, ours = pair(batch_first=True)
    x = torch.randn(*size, 16).double()
    assert ours(x, x, x)[0].shape == (*size, 16)


def test_copies_pickles_and_meta():
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 6, 16).double()
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(clone(x, x, x)[0], ours(x, x, x)[0])
    made = LSMultiHeadAttention(16, 4, device="meta").to_empty(device="cpu")
    assert made.in_proj_weight.device.type == "cpu"


def test_compiles_into_one_graph():
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 6, 16).double()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for need_weights in (True, False):
        expected = ours(x, x, x, need_weights=need_weights)[0]
        torch.testing.assert_close(compiled(x, x, x, need_weights=need_weights)[0], expected)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LSMultiHeadAttention(100, 16), ["100", "16", "20, 25", "head_dim"]),
        (lambda: LSMultiHeadAttention(0, 1), ["greater than 0"]),
        (lambda: LSMultiHeadAttention(16, 4, head_dim=-1), ["greater than 0", "-1"]),
        (lambda: LSMultiHeadAttention(16, 4, dropout=1.5), ["[0, 1]", "1.5"]),
    ],
)
def test_bad_sizes_say_what_is_allowed(make, words):
    with pytest.raises(ValueError, match="got|divisible") as error:
        make()
    assert all(word in str(error.value) for word in words)


def test_bad_calls_say_what_is_expected():
    module = LSMultiHeadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 6, 16)
    with pytest.raises(RuntimeError, match=r"attn_mask must have shape \(6, 6\) or \(8, 6, 6\)"):
        module(x, x, x, attn_mask=torch.zeros(5, 6))
    with pytest.raises(AssertionError, match=r"key_padding_mask must have shape \(2, 6\)"):
        module(x, x, x, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="is_causal"):
        module(x, x, x, is_causal=True)
    with pytest.raises(AssertionError, match="channels"):
        module(x[..., :8], x, x)
