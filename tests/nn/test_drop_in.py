"""LSMultiHeadAttention wherever `nn.MultiheadAttention` is: layers, errors, masks, module tools."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lsmha_fast import LSMultiHeadAttention


def swapped(model):
    """A copy of `model` with every nn.MultiheadAttention replaced, and a list of our calls."""
    model, calls = copy.deepcopy(model), []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.MultiheadAttention:
                ours = LSMultiHeadAttention(
                    child.embed_dim, child.num_heads, child.dropout, batch_first=child.batch_first
                )
                ours.load_state_dict(child.state_dict())
                ours.train(child.training)
                ours.forward = _counted(ours.forward, calls)
                setattr(parent, name, ours)
    return model, calls


def _counted(forward, calls):
    def run(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    return run


def padding(batch, tokens):
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    mask[1, -2:] = True
    return mask


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("heads", [4, 3])
def test_encoder_calls_us_always(training, grad, norm_first, heads):
    layer = nn.TransformerEncoderLayer(
        12, heads, 32, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).train(training)
    ours, calls = swapped(encoder)
    x = torch.randn(2, 7, 12)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(x), encoder(x))
        assert len(calls) == 3
        mask = padding(2, 7)
        kept = ~mask[..., None]  # what torch writes at padding differs between its own paths
        expected = encoder(x, src_key_padding_mask=mask) * kept
        torch.testing.assert_close(ours(x, src_key_padding_mask=mask) * kept, expected)
    assert len(calls) == 6


def test_encoder_that_makes_nested_tensors_calls_us():
    layer = nn.TransformerEncoderLayer(12, 4, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    ours, calls = swapped(encoder)
    x, mask = torch.randn(2, 7, 12), padding(2, 7)
    with torch.no_grad():
        out = ours(x, src_key_padding_mask=mask)
        torch.testing.assert_close(out, encoder(x, src_key_padding_mask=mask))
    assert len(calls) >= 2
    assert (out[1, -2:] == 0).all()  # nested tensors were really made


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_calls_us_in_every_layer(training, batch_first):
    model = nn.Transformer(12, 4, 2, 2, 32, dropout=0.0, batch_first=batch_first).train(training)
    ours, calls = swapped(model)
    source, target = torch.randn(2, 6, 12), torch.randn(2, 5, 12)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    options = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding(2, 6)}
    with torch.no_grad():
        torch.testing.assert_close(
            ours(source, target, **options), model(source, target, **options)
        )
    assert len(calls) == 6  # two in the encoder, two times two in the decoder


def test_skipping_us_is_an_error_not_silence():
    layer = nn.TransformerEncoderLayer(12, 4, 32, batch_first=True)
    layer.self_attn = LSMultiHeadAttention(12, 4, batch_first=True)
    layer.eval()
    layer.self_attn._forward_pre_hooks.clear()
    with torch.no_grad(), pytest.raises(RuntimeError, match="would skip LSMultiHeadAttention"):
        layer(torch.randn(2, 5, 12))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    module = LSMultiHeadAttention(12, 3, batch_first=True)
    rows = [torch.randn(4, 12), torch.randn(6, 12)]
    nested = torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)
    out, weights = module(nested, nested, nested)
    assert weights.shape == (2, 6, 6)
    for row, actual in zip(rows, out.unbind(), strict=True):
        torch.testing.assert_close(actual, module(row, row, row)[0])
    (nested + out).to_padded_tensor(0.0).sum().backward()
    assert nested.grad.is_nested
    other = torch.nested.nested_tensor([torch.randn(3, 12), torch.randn(2, 12)], layout=layout)
    cross = module(nested, other, other)[0].unbind()[1]
    key = other.unbind()[1]
    torch.testing.assert_close(cross, module(rows[1], key, key)[0])
    with pytest.raises(AssertionError, match="nested"):
        module(nested, rows[0], rows[0])
    with pytest.raises(AssertionError, match="no masks"):
        module(nested, nested, nested, key_padding_mask=padding(2, 6))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("floats", [True, False])
@pytest.mark.parametrize("which", ["key_padding_mask", "attn_mask"])
def test_fully_masked_rows_are_zeros_in_every_mode(need_weights, training, floats, which):
    module = LSMultiHeadAttention(16, 4, batch_first=True).train(training)
    nn.init.normal_(module.out_proj.bias)
    mask = torch.zeros(2, 5, dtype=torch.bool) if which[0] == "k" else torch.zeros(5, 5).bool()
    mask[1] = True
    if floats:
        mask = torch.zeros(mask.shape).masked_fill(mask, float("-inf"))
    x = torch.randn(2, 5, 16, requires_grad=True)
    rows = (1, slice(None)) if which[0] == "k" else (slice(None), 1)
    out, weights = module(x, x, x, need_weights=need_weights, **{which: mask})
    empty = out[rows]
    torch.testing.assert_close(empty, module.out_proj.bias.expand_as(empty))
    assert weights is None or (weights[rows] == 0).all()
    out.square().sum().backward()
    assert torch.isfinite(x.grad).all()


BAD_CALLS = {
    "4-D query": lambda m, x: m(x[None], x[None], x[None]),
    "2-D key": lambda m, x: m(x, x[0], x),
    "channels": lambda m, x: m(x[..., :8], x, x),
    "value channels": lambda m, x: m(x, x, x[..., :8]),
    "key and value channels": lambda m, x: m(x, x[..., :8], x[..., :8]),
    "value tokens": lambda m, x: m(x, x, x[:, :4]),
    "key batch": lambda m, x: m(x, x[:1], x[:1]),
    "mask 1-D": lambda m, x: m(x, x, x, attn_mask=torch.zeros(6)),
    "mask shape": lambda m, x: m(x, x, x, attn_mask=torch.zeros(5, 6)),
    "mask 3-D shape": lambda m, x: m(x, x, x, attn_mask=torch.zeros(3, 6, 6)),
    "mask unbatched": lambda m, x: m(x[0], x[0], x[0], attn_mask=torch.zeros(3, 6, 6)),
    "mask int": lambda m, x: m(x, x, x, attn_mask=torch.zeros(6, 6).int()),
    "padding 1-D": lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(6)),
    "padding shape": lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(2, 5)),
    "padding int": lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(2, 6).int()),
    "causal": lambda m, x: m(x, x, x, is_causal=True),
    "dtype": lambda m, x: m(x.double(), x.double(), x.double()),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_raise_what_torch_raises(name):
    errors = []
    for cls in (nn.MultiheadAttention, LSMultiHeadAttention):
        module = cls(16, 4, batch_first=True)
        with pytest.raises((AssertionError, RuntimeError)) as error:
            BAD_CALLS[name](module, torch.randn(2, 6, 16))
        errors.append(error.type)
    assert issubclass(errors[1], errors[0])


@pytest.mark.parametrize("args", [(0, 1), (16, 0), (10, 3)])
def test_bad_constructors_raise_what_torch_raises(args):
    errors = []
    for cls in (nn.MultiheadAttention, LSMultiHeadAttention):
        with pytest.raises((AssertionError, ValueError)) as error:
            cls(*args)
        errors.append(error.type)
    assert issubclass(errors[1], errors[0])


OPTIONS = [
    {},
    {"bias": False},
    {"kdim": 6, "vdim": 10},
    {"add_bias_kv": True, "add_zero_attn": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", [(2, 0, 3), (2, 3, 0), (0, 3, 3), (2, 4, 3)])
def test_sizes_and_initial_weights_are_torchs(options, sizes):
    B, L, S = sizes
    modules = []
    for cls in (nn.MultiheadAttention, LSMultiHeadAttention):
        torch.manual_seed(3)
        modules.append(cls(16, 4, **options))
    theirs, ours = modules
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    q = torch.randn(L, B, 16)
    k, v = torch.randn(S, B, ours.kdim), torch.randn(S, B, ours.vdim)
    for need_weights in (True, False):
        expected = theirs(q, k, v, need_weights=need_weights)
        torch.testing.assert_close(ours(q, k, v, need_weights=need_weights), expected)


def test_causal_hint_decides_as_in_torch():
    theirs, ours = nn.MultiheadAttention(16, 4), LSMultiHeadAttention(16, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 16)
    for need_weights in (True, False):
        options = {"attn_mask": torch.zeros(5, 5), "is_causal": True, "need_weights": need_weights}
        torch.testing.assert_close(ours(x, x, x, **options), theirs(x, x, x, **options))


def test_average_weights_have_a_gradient():
    theirs, ours = (
        cls(16, 4, batch_first=True).double()
        for cls in (nn.MultiheadAttention, LSMultiHeadAttention)
    )
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 16).double()
    grads = []
    for module in (theirs, ours):
        given = x.clone().requires_grad_()
        weights = module(given, given, given)[1]
        (weights * torch.arange(5)).square().sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(*grads)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrize_and_its_removal():
    module = LSMultiHeadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    doubled = copy.deepcopy(module)
    with torch.no_grad():
        doubled.in_proj_weight.mul_(2)
    parametrize.register_parametrization(module, "in_proj_weight", Twice())
    assert isinstance(module, nn.MultiheadAttention)
    torch.testing.assert_close(module(x, x, x), doubled(x, x, x))
    parametrize.remove_parametrizations(module, "in_proj_weight")
    torch.testing.assert_close(module(x, x, x), doubled(x, x, x))


def test_weight_tying_sums_gradients():
    a, b = (LSMultiHeadAttention(16, 4, batch_first=True) for _ in range(2))
    b.in_proj_weight = a.in_proj_weight
    x = torch.randn(2, 5, 16)
    (a(x, x, x)[0] + b(x, x, x)[0]).square().sum().backward()
    assert a.in_proj_weight.grad is b.in_proj_weight.grad
    assert len(list(nn.ModuleList([a, b]).parameters())) == 7


def test_frozen_module_passes_gradients_on():
    module = LSMultiHeadAttention(16, 4, batch_first=True).requires_grad_(False)
    x = torch.randn(2, 5, 16, requires_grad=True)
    module(x, x, x)[0].sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("need_weights", [True, False])
def test_conversion(dtype, need_weights):
    module = LSMultiHeadAttention(16, 4, batch_first=True).to(dtype)
    x = torch.randn(2, 5, 16, dtype=dtype)
    out, weights = module(x, x, x, need_weights=need_weights, key_padding_mask=padding(2, 5))
    assert out.dtype == dtype
    assert weights is None or weights.dtype == dtype
    assert torch.isfinite(out).all()


def test_copies_keep_the_call_and_the_guard():
    module = LSMultiHeadAttention(12, 4, batch_first=True, head_dim=5, qkv_bias=False)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    x = torch.randn(2, 5, 12)
    for clone in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ):
        torch.testing.assert_close(clone(x, x, x), module(x, x, x))
        assert len(clone._forward_pre_hooks) == 1
    empty = LSMultiHeadAttention(12, 4, device="meta").to_empty(device="cpu")
    empty._reset_parameters()
    assert all(torch.isfinite(p).all() for p in empty.parameters())


@pytest.mark.parametrize("heads", [1, 3, 7, 16, 48])
def test_any_number_of_heads(heads):
    theirs = nn.MultiheadAttention(336, heads, batch_first=True)
    ours = LSMultiHeadAttention(336, heads, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 336)
    for training, grad in itertools.product((True, False), repeat=2):
        with torch.set_grad_enabled(grad):
            expected = theirs.train(training)(x, x, x)
            torch.testing.assert_close(ours.train(training)(x, x, x), expected)
