"""conv_stem: against the three PyTorch calls, formula, registration, bad input."""

import functools

import pytest
import torch
import torch.nn.functional as F

from lsmha_fast.ops import conv_stem
from lsmha_fast.ops.conv_stem import Pool, op, reference

# Cin, C, H, W, kernel, stride, padding, pool; odd images, every kernel size, windows that leave
# the image, that do not meet, that are wider than the plane
GEOMETRIES = [
    (3, 5, 7, 5, 3, 1, 1, (3, 2, 1)),
    (1, 4, 11, 8, 7, 2, 3, (3, 2, 1)),
    (2, 3, 5, 6, 1, 1, 0, None),
    (2, 3, 8, 7, 3, 2, 1, None),
    (3, 2, 9, 9, 3, 2, 0, (2, 2, 0)),
    (1, 2, 3, 3, 3, 1, 1, (3, 1, 1)),
    (1, 2, 4, 1, 3, 1, 1, (3, 2, 1)),
    (2, 1, 3, 2, 1, 1, 1, (2, 1, 1)),
    (1, 2, 9, 9, 5, 1, 2, (3, 4, 0)),
]


def inputs(geometry, dtype=torch.float64, B=2):
    CIN, C, H, W, kernel = geometry[:5]
    x = torch.randn(B, CIN, H, W, dtype=dtype)
    weight = torch.randn(C, CIN, kernel, kernel, dtype=dtype) * (CIN * kernel**2) ** -0.5
    return [t.requires_grad_() for t in (x, weight, torch.randn(C, dtype=dtype))]


def three_calls(x, weight, bias=None, *, stride, padding, pool):
    y = F.relu(F.conv2d(x, weight, bias, stride, padding))
    return (F.max_pool2d(y, *pool) if pool else y).flatten(2).transpose(1, 2)


def options(geometry):
    return dict(zip(("stride", "padding", "pool"), geometry[5:], strict=True))


def grid(geometry):
    """Rows and columns of the convolution and of the tokens."""
    _, _, H, W, kernel, stride, padding, pool = geometry
    conv = [(n + 2 * padding - kernel) // stride + 1 for n in (H, W)]
    if pool is None:
        return conv, conv
    return conv, [(n + 2 * pool[2] - pool[0]) // pool[1] + 1 for n in conv]


@pytest.mark.parametrize("B", [0, 1, 3])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_equals_the_three_pytorch_calls(geometry, with_bias, B):
    tensors = inputs(geometry, B=B)[: 2 + with_bias]
    actual = conv_stem(*tensors, **options(geometry))
    expected = three_calls(*tensors, **options(geometry))
    torch.testing.assert_close(actual, expected)
    assert actual.is_contiguous()
    do = torch.randn_like(actual)
    grads = torch.autograd.grad(actual, tensors, do)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, tensors, do))


@pytest.mark.parametrize("geometry", GEOMETRIES[:7], ids=str)
def test_gradient_formula(geometry):
    call = functools.partial(conv_stem, **options(geometry))
    assert torch.autograd.gradcheck(call, inputs(geometry, B=1))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gathered_and_scattered_gradients_of_the_pooling_agree(geometry):
    (rows, cols), size = grid(geometry)
    pool = list(geometry[7] or (1, 1, 0))
    x, weight, bias = (t.detach() for t in inputs(geometry))
    out, codes = reference.conv_stem(x, weight, bias, *geometry[5:7], pool, True)
    do, codes = (t.unflatten(1, size) for t in (torch.randn_like(out), codes))
    gathered = reference.pooled_gradient(do, codes, rows, cols, pool)
    torch.testing.assert_close(gathered, reference.scattered_gradient(do, codes, rows, cols, pool))
    # nothing is lost: every positive output passes its gradient on exactly once
    passed = do.masked_fill(codes == pool[0] ** 2, 0.0)
    torch.testing.assert_close(gathered.sum((1, 2)), passed.sum((1, 2)))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_codes_name_the_first_of_the_largest_sums(geometry):
    pool = Pool(*(geometry[7] or (1, 1, 0)))
    x, weight, _ = inputs(geometry)
    # halves: the sums are exact and many are equal
    x, weight = ((t.detach() * 2).round() / 2 for t in (x, weight))
    out, codes = reference.conv_stem(x, weight, None, *geometry[5:7], list(pool), True)
    y = F.conv2d(x, weight, None, *geometry[5:7])
    y = F.pad(y, [pool.padding] * 4, value=-torch.inf)
    windows = y.unfold(2, pool.kernel, pool.stride).unfold(3, pool.kernel, pool.stride)
    best, first = windows.flatten(4).max(-1)  # of equal values, max gives the first
    first = first.masked_fill(best <= 0, pool.kernel**2)
    assert torch.equal(codes, first.flatten(2).transpose(1, 2).to(torch.uint8))
    assert torch.equal(out, best.relu().flatten(2).transpose(1, 2))


def test_equal_sums_send_their_gradient_to_the_first_position():
    x = torch.ones(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    out = conv_stem(x, weight, stride=1, padding=0)
    out.sum().backward()
    expected = x.detach().clone().requires_grad_()
    three_calls(expected, weight, stride=1, padding=0, pool=(3, 2, 1)).sum().backward()
    assert torch.equal(x.grad, expected.grad)
    assert x.grad[0, 0, 0, 0] == 1
    assert x.grad[0, 0, 5, 5] == 0


def test_zero_outputs_pass_no_gradient():
    x, weight, _ = inputs(GEOMETRIES[0])
    bias = torch.full((5,), -100.0, dtype=torch.float64, requires_grad=True)
    out = conv_stem(x, weight, bias, stride=1, padding=1)
    assert not out.any()
    for grad in torch.autograd.grad(out.sum(), (x, weight, bias)):
        assert not grad.any()


def test_nan_is_not_swallowed():
    x, weight, bias = (t.detach() for t in inputs(GEOMETRIES[0]))
    x[0, 0, 4, 4] = torch.nan
    expected = three_calls(x, weight, bias, stride=1, padding=1, pool=(3, 2, 1))
    actual = conv_stem(x, weight, bias, stride=1, padding=1)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_fp32(dtype):
    x, weight, bias = (t.detach().to(dtype) for t in inputs(GEOMETRIES[0]))
    high = conv_stem(x.double(), weight.double(), bias.double(), stride=1, padding=1)
    # one rounding, at the end
    assert torch.equal(conv_stem(x, weight, bias, stride=1, padding=1), high.float().to(dtype))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_only_the_wanted_gradients(needed):
    tensors = inputs(GEOMETRIES[0])
    every = torch.autograd.grad(conv_stem(*tensors, stride=1, padding=1).sum(), tensors)
    some = [t.detach().requires_grad_(i in needed) for i, t in enumerate(tensors)]
    conv_stem(*some, stride=1, padding=1).sum().backward()
    for i, t in enumerate(some):
        assert (t.grad is not None) == (i in needed)
        if i in needed:
            torch.testing.assert_close(t.grad, every[i])


def test_tokens_are_the_next_layers_image_without_a_copy():
    x, weight, bias = inputs(GEOMETRIES[0])
    tokens = conv_stem(x, weight, bias, stride=1, padding=1)
    image = tokens.unflatten(1, (4, 3)).permute(0, 3, 1, 2)
    assert image.is_contiguous(memory_format=torch.channels_last)
    second = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    conv_stem(image, second, stride=1, padding=1).sum().backward()
    grads = [t.grad for t in (x, weight, bias)]
    for t in (x, weight, bias):
        t.grad = None
    y = F.max_pool2d(F.relu(F.conv2d(x, weight, bias, 1, 1)), 3, 2, 1)
    three_calls(y, second, stride=1, padding=1, pool=(3, 2, 1)).sum().backward()
    torch.testing.assert_close(grads, [t.grad for t in (x, weight, bias)])


@pytest.mark.parametrize("geometry", GEOMETRIES[:3], ids=str)
def test_opcheck(geometry):
    x, weight, bias = inputs(geometry, torch.float32)
    pool = list(geometry[7] or (1, 1, 0))
    tail = *geometry[5:7], pool
    ops = torch.ops.lsmha_fast
    for need_codes in (True, False):
        arguments = x.detach(), weight.detach(), bias.detach(), *tail, need_codes, "reference"
        torch.library.opcheck(ops.conv_stem.default, arguments)
    out, codes = ops.conv_stem(x.detach(), weight.detach(), None, *tail, True, "reference")
    for needed in ((True, True), (True, False), (False, True)):
        arguments = out, x.detach(), weight.detach(), codes, *tail, *needed, "reference"
        torch.library.opcheck(ops.conv_stem_backward.default, arguments)


def test_compiles_as_one_graph():
    tensors = inputs(GEOMETRIES[0], torch.float32)
    compiled = torch.compile(conv_stem, fullgraph=True, backend="aot_eager")
    for pool in (Pool(), (2, 2, 0), None):
        out = conv_stem(*tensors, stride=1, padding=1, pool=pool)
        again = compiled(*tensors, stride=1, padding=1, pool=pool)
        do = torch.randn_like(out)
        assert torch.equal(out, again)
        pairs = zip(*(torch.autograd.grad(o, tensors, do) for o in (out, again)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        with torch.no_grad():
            assert torch.equal(compiled(*tensors, stride=1, padding=1, pool=pool), out)


def test_default_backend_of_fp64_is_the_reference(monkeypatch):
    asked = []
    load = op.load_backend
    monkeypatch.setattr(op, "load_backend", lambda *a: asked.append(a[1]) or load(*a))
    conv_stem(*inputs(GEOMETRIES[0]), stride=1, padding=1).sum().backward()
    # also where Triton's interpreter could run the call
    assert asked == ["reference", "reference"]


X, WEIGHT, BIAS = torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3), torch.zeros(4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": X[0]}, r"x \(3, 8, 8\)"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, r"weight \(4, 2, 3, 3\)"),
        ({"weight": torch.zeros(4, 3, 3, 5)}, r"weight \(4, 3, 3, 5\)"),
        ({"bias": torch.zeros(5)}, r"bias \(4,\), got \(5,\)"),
        ({"bias": BIAS.double()}, "float64"),
        ({"weight": WEIGHT.half()}, "float16"),
        ({"x": X.long(), "weight": WEIGHT.long(), "bias": BIAS.long()}, "int64"),
        ({"stride": 0}, "got 0, 1"),
        ({"padding": -1}, "got 1, -1"),
        ({"pool": (3, 2, 2)}, "padding=2"),
        ({"pool": (16, 2, 1)}, "kernel=16"),
        ({"pool": (3, 0, 1)}, "stride=0"),
        ({"x": X[:, :, :1, :1], "padding": 0}, r"x \(2, 3, 1, 1\)"),
        ({"pool": (11, 1, 0)}, "kernel=11"),
        ({"backend": "numpy"}, "unknown backend 'numpy'; choose from reference, triton, cuda, cpp"),
    ],
)
def test_bad_input_is_an_error_that_shows_the_value(change, message):
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS, "stride": 1, "padding": 1} | change
    with pytest.raises(ValueError, match=message):
        conv_stem(**arguments)
