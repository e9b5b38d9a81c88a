"""linear: equal to F.linear by the error rule, by a convolution exactly where it is allowed to."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lsmha_fast import LSMultiHeadAttention
from lsmha_fast.deploy.published import with_published_attention
from lsmha_fast.models import CCT
from lsmha_fast.nn import EncoderBlock, prune_hidden
from lsmha_fast.nn import linear as module
from lsmha_fast.nn.linear import IMAGES, MIN_ROWS, Linear, linear
from lsmha_fast.testing import assert_no_worse

SHAPES = [(MIN_ROWS,), (3, 256), (16, 256), (4, 4, 8, 8)]


@pytest.fixture
def counted(monkeypatch):
    """Lets every processor take the convolution; a list that grows with each one taken."""
    calls, conv2d = [], F.conv2d

    def count(*args):
        calls.append(args[0].shape)
        return conv2d(*args)

    monkeypatch.setattr(module, "convolutions_win", lambda: True)
    monkeypatch.setattr(module.F, "conv2d", count)
    return calls


def inputs(lead, bias=True, inside=96, outside=64):
    x, weight = torch.randn(*lead, inside), torch.randn(outside, inside) * inside**-0.5
    return x, weight, torch.randn(outside) if bias else None


def run(function, x, weight, bias, dy):
    tensors = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = function(*tensors)
    return y.detach(), *torch.autograd.grad(y, tensors, dy)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", SHAPES, ids=str)
def test_values_and_gradients(lead, bias, counted):
    x, weight, b = inputs(lead, bias)
    dy = torch.randn(*lead, 64)
    actual = run(linear, x, weight, b, dy)
    assert len(counted) == 1
    low = run(F.linear, x, weight, b, dy)
    high = run(F.linear, *(None if t is None else t.double() for t in (x, weight, b, dy)))
    for a, lo, hi, factor in zip(actual, low, high, (2, 3, 3, 3), strict=False):
        assert_no_worse(a, lo, hi, factor)


def test_any_strides(counted):
    x = torch.randn(256, 4, 96).transpose(0, 1)
    _, weight, bias = inputs((1,))
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    assert counted == [(IMAGES, 96, 1024 // IMAGES, 1)]


def test_second_derivative(counted):
    x, weight, bias = (t.requires_grad_() for t in inputs((2, 256)))

    def penalty(function):
        (dx,) = torch.autograd.grad(function(x, weight, bias).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), weight)[0]

    torch.testing.assert_close(penalty(linear), penalty(F.linear), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case",
    ["few rows", "odd rows", "few inputs", "few outputs", "float64", "bfloat16", "no rows"],
)
def test_takes_the_product_where_nothing_is_won(case, counted):
    rows = {"few rows": MIN_ROWS - IMAGES, "odd rows": MIN_ROWS + 1, "no rows": 0}.get(
        case, MIN_ROWS
    )
    inside, outside = (48 if case == f"few {side}puts" else 64 for side in ("in", "out"))
    tensors = inputs((rows,), inside=inside, outside=outside)
    dtype = getattr(torch, case, torch.float32)
    tensors = [t.to(dtype) for t in tensors]
    assert torch.equal(linear(*tensors), F.linear(*tensors))
    assert counted == []


def test_takes_the_product_where_a_transform_looks_on(counted):
    x, weight, bias = inputs((3, MIN_ROWS))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    mapped = torch.vmap(linear, (0, None, None))(x, weight, bias)
    torch.testing.assert_close(mapped, F.linear(x, weight, bias))
    layer = Linear(96, 64)
    exported = torch.export.export(layer, (x,)).graph
    traced = torch.jit.trace(layer, (x,), check_trace=False).inlined_graph
    symbolic = torch.fx.symbolic_trace(layer).graph
    assert counted == []
    assert all("linear" in str(graph) for graph in (exported, traced, symbolic))


def test_compiles_without_a_break(counted):
    x, weight, bias = inputs((2, 256))
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))


def test_the_same_bits_every_time(counted):
    tensors, dy = inputs((4, 256)), torch.randn(4, 256, 64)
    first, second = run(linear, *tensors, dy), run(linear, *tensors, dy)
    assert all(map(torch.equal, first, second))


def test_modules_keep_their_types_and_names():
    block = EncoderBlock(64, 4)
    layers = {"linear1", "linear2", "self_attn.out_proj"}
    assert layers == {n for n, m in block.named_modules() if isinstance(m, Linear)}
    assert all(isinstance(m, Linear) for m in prune_hidden(block, [0, 2]))
    mha = nn.MultiheadAttention(64, 4)
    assert isinstance(LSMultiHeadAttention(64, 4).out_proj, type(mha.out_proj))
    assert list(Linear(3, 4).state_dict()) == list(nn.Linear(3, 4).state_dict())
    assert torch.equal(copy.deepcopy(block).linear1.weight, block.linear1.weight)


def test_the_published_form_computes_by_plain_products():
    model = CCT(dim=64, depth=1, num_heads=2)
    published = with_published_attention(model)
    assert not any(isinstance(m, Linear) for m in published.modules())
    assert any(isinstance(m, Linear) for m in model.modules())
