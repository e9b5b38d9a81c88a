"""conv_stem's Triton kernels: against fp64 and the reference's codes; layouts, ties, memory.

Without a GPU they run in Triton's interpreter, which does not know bfloat16.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from lsmha_fast.ops import conv_stem
from lsmha_fast.ops._dispatch import BackendError
from lsmha_fast.ops.conv_stem import _triton, reference
from lsmha_fast.testing import assert_no_worse, nan_filled_empty

# B, Cin, C, H, W, kernel, stride, padding, pool
GEOMETRIES = [
    (3, 3, 5, 7, 5, 3, 1, 1, (3, 2, 1)),  # the published 3x3 stem, odd in everything
    (1, 1, 4, 9, 5, 7, 2, 3, (3, 2, 1)),
    (3, 5, 3, 6, 5, 3, 1, 1, (3, 2, 1)),
    (2, 3, 2, 9, 8, 3, 2, 0, (2, 2, 0)),  # dx of a strided convolution; no row to carry
    (1, 2, 18, 5, 6, 1, 1, 0, None),
    (1, 2, 2, 4, 4, 3, 1, 1, (3, 1, 1)),  # two rows in common
    (1, 2, 2, 4, 1, 3, 1, 1, (3, 2, 1)),  # windows wider than the image
    (1, 1, 3, 3, 2, 1, 1, 1, (2, 1, 1)),  # padding larger than the filter reaches
    (1, 1, 2, 9, 9, 5, 1, 2, (3, 4, 0)),  # sums that no window sees
]
# more than one block of channels, of columns, of filter values
BLOCKS = [
    (1, 3, 70, 3, 3, 3, 1, 1, (3, 2, 1)),
    (9, 1, 2, 3, 17, 3, 1, 1, (3, 2, 1)),
    (1, 8, 3, 4, 4, 3, 1, 1, (3, 2, 1)),
]
TINY = (2, 1, 3, 4, 3, 3, 1, 1, (3, 2, 1))
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    """What the kernels are measured against must not round to tf32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def inputs(geometry, dtype, device, exact=False):
    """Images, filters, bias; the sums of exact ones need no rounding and are often equal."""
    B, CIN, C, H, W, kernel = geometry[:6]
    shapes = (B, CIN, H, W), (C, CIN, kernel, kernel), (C,)
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    if exact:
        return [((t * 2).round() / 2).to(dtype) for t in tensors]
    tensors[1] *= (CIN * kernel**2) ** -0.5
    return [t.to(dtype) for t in tensors]


def geometry_of(geometry):
    return *geometry[6:8], list(geometry[8] or (1, 1, 0))


def three_calls(x, weight, bias, stride, padding, pool):
    y = F.relu(F.conv2d(x, weight, bias, stride, padding))
    return F.max_pool2d(y, *pool).flatten(2).transpose(1, 2)


def with_gradients(function, tensors, do):
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, do.to(out.dtype))


def assert_matches_fp64(geometry, tensors, do=None):
    stride, padding, pool = geometry_of(geometry)

    def ours(*tensors):
        return conv_stem(*tensors, stride=stride, padding=padding, pool=pool, backend="triton")

    def plain(*tensors):
        return three_calls(*tensors, stride, padding, pool)

    if do is None:
        do = torch.randn_like(plain(*tensors))
    with nan_filled_empty():
        actual = with_gradients(ours, tensors, do)
    low = with_gradients(plain, tensors, do)
    high = with_gradients(plain, [t.double() for t in tensors], do)
    for a, lo, hi, factor in zip(actual, low, high, (2.0, 3.0, 3.0, 3.0), strict=True):
        assert_no_worse(a, lo, hi, factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES + BLOCKS, ids=str)
def test_outputs_and_gradients_match_fp64(geometry, dtype, device):
    assert_matches_fp64(geometry, inputs(geometry, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES + BLOCKS[:1], ids=str)
def test_outputs_and_codes_equal_the_references(geometry, dtype, device):
    arguments = *inputs(geometry, dtype, device, exact=True), *geometry_of(geometry), True
    out, codes = _triton.conv_stem(*arguments)
    expected, expected_codes = reference.conv_stem(*arguments)
    assert torch.equal(out, expected)
    assert torch.equal(codes, expected_codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_sums_the_first_position_is_named(dtype, device):
    x = torch.ones(1, 1, 6, 6, device=device, dtype=dtype)
    _, codes = _triton.conv_stem(x, x[:, :, :1, :1], None, 1, 0, [3, 2, 1], True)
    # windows at the upper and left border begin outside the image
    expected = torch.tensor([[4, 3, 3], [1, 0, 0], [1, 0, 0]], device=device)
    assert torch.equal(codes.flatten(), expected.flatten().to(torch.uint8))


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "tokens"])
def test_strided_images(layout, device):
    geometry = GEOMETRIES[0]
    x, weight, bias = inputs(geometry, torch.float32, device)
    if layout == "channels_last":
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    elif layout == "sliced":
        large = torch.randn(3, 6, 15, 10, device=device)
        x = large[:, ::2, 1::2, 2:7]
        weight = torch.randn(3, 5, 4, 3, device=device).transpose(0, 1)[:, :, :3] * 0.2
    else:
        x = torch.randn(3, 35, 3, device=device).unflatten(1, (7, 5)).permute(0, 3, 1, 2)
    assert x.shape == geometry[:2] + geometry[3:5]
    assert layout == "sliced" or x.is_contiguous(memory_format=torch.channels_last)
    assert_matches_fp64(geometry, [x, weight, bias])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_strided_output_gradient(backend, device):
    arguments = inputs(TINY, torch.float32, device)
    out, codes = reference.conv_stem(*arguments, 1, 1, [3, 2, 1], True)
    backward = {"reference": reference, "triton": _triton}[backend].conv_stem_backward
    x, weight, _ = arguments
    for do in (
        torch.ones((), device=device).expand(out.shape),
        torch.randn(3, 4, 2, device=device).permute(2, 1, 0),
    ):
        for need_dx in (True, False):
            tail = x, weight, codes, 1, 1, [3, 2, 1], need_dx, True
            for a, b in zip(backward(do, *tail), backward(do.contiguous(), *tail), strict=True):
                torch.testing.assert_close(a, b)


def test_fused_and_gathered_weight_gradients_agree(device):
    x, weight, bias = inputs(TINY, torch.float32, device)
    out, codes = _triton.conv_stem(x, weight, bias, 1, 1, [3, 2, 1], True)
    do = torch.randn_like(out)
    every = _triton.conv_stem_backward(do, x, weight, codes, 1, 1, [3, 2, 1], True, True)
    fused = _triton.conv_stem_backward(do, x, weight, codes, 1, 1, [3, 2, 1], False, True)
    only_dx = _triton.conv_stem_backward(do, x, weight, codes, 1, 1, [3, 2, 1], True, False)
    assert fused[0].numel() == only_dx[1].numel() == only_dx[2].numel() == 0
    torch.testing.assert_close(every[1:], fused[1:])
    assert torch.equal(every[0], only_dx[0])


def test_without_codes_the_output_is_the_same(device):
    x, weight, bias = inputs(TINY, torch.float32, device)
    with nan_filled_empty():
        bare, none = _triton.conv_stem(x, weight, bias, 1, 1, [3, 2, 1], False)
        out, _ = _triton.conv_stem(x, weight, bias, 1, 1, [3, 2, 1], True)
    assert none.numel() == 0
    assert torch.equal(bare, out)


def test_strips_and_the_batch_do_not_change_a_bit(device, monkeypatch):
    x, weight, bias = inputs(TINY, torch.float32, device)
    out, codes = _triton.conv_stem(x, weight, bias, 1, 1, [3, 2, 1], True)
    assert torch.equal(_triton.conv_stem(x[1:], weight, bias, 1, 1, [3, 2, 1], True)[0], out[1:])
    # one program for all rows in place of one per row
    monkeypatch.setattr(_triton, "PROGRAMS", 1)
    for a, b in zip(
        _triton.conv_stem(x, weight, bias, 1, 1, [3, 2, 1], True), (out, codes), strict=True
    ):
        assert torch.equal(a, b)
    assert_matches_fp64(TINY, [x, weight, bias])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype, device):
    x, weight, bias = inputs((0, *GEOMETRIES[0][1:]), dtype, device)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    out = conv_stem(*tensors, stride=1, padding=1, backend="triton")
    assert out.shape == (0, 12, 5)
    dx, *others = torch.autograd.grad(out.sum(), tensors)
    assert dx.shape == x.shape
    assert not any(grad.any() for grad in others)


def test_nan_is_not_swallowed(device):
    x, weight, bias = inputs(GEOMETRIES[0], torch.float32, device)
    x[0, 0, 4, 4] = torch.nan
    actual = conv_stem(x, weight, bias, stride=1, padding=1, backend="triton")
    expected = three_calls(x, weight, bias, 1, 1, (3, 2, 1))
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_opcheck_and_compile(device):
    x, weight, bias = inputs(TINY, torch.float32, device)
    tail = 1, 1, [3, 2, 1]
    out, codes = _triton.conv_stem(x, weight, bias, *tail, True)
    ops = torch.ops.lsmha_fast
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops.conv_stem.default, (x, weight, bias, *tail, True, "triton"), test_utils=checks
    )
    arguments = out, x, weight, codes, *tail, True, True, "triton"
    torch.library.opcheck(ops.conv_stem_backward.default, arguments, test_utils=checks)

    def call(*tensors):
        return conv_stem(*tensors, stride=1, padding=1, backend="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager, again = (with_gradients(f, (x, weight, bias), out) for f in (call, compiled))
    for a, b in zip(eager, again, strict=True):
        assert torch.equal(a, b)


def test_named_backend_is_refused_where_it_cannot_run(device):
    x, weight, bias = (t.double() for t in inputs(GEOMETRIES[0], torch.float32, device))
    with pytest.raises(BackendError, match="float64 is not one of float32, float16, bfloat16"):
        conv_stem(x, weight, bias, stride=1, padding=1, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "geometry",
    [
        (64, 3, 256, 32, 32, 3, 1, 1, (3, 2, 1)),
        (16, 64, 128, 16, 16, 3, 1, 1, (3, 2, 1)),
        (2, 3, 64, 224, 224, 7, 2, 3, (3, 2, 1)),
        (3, 64, 96, 28, 28, 7, 2, 3, (3, 2, 1)),
    ],
    ids=str,
)
def test_real_layers_on_a_gpu(geometry, dtype):
    tensors = inputs(geometry, dtype, "cuda")
    if geometry[1] > 3:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    stride, padding, pool = geometry_of(geometry)
    # codes first, then gradients along the same codes: near-ties may fall either way
    out, codes = _triton.conv_stem(*tensors, stride, padding, pool, True)
    wide = [t.double() for t in tensors]
    high, _ = reference.conv_stem(*wide, stride, padding, pool, True)
    low = three_calls(*tensors, stride, padding, pool)
    assert_no_worse(out, low, high)
    do = torch.randn_like(out)
    x, weight, _ = tensors
    tail = codes, stride, padding, pool, True, True
    actual = _triton.conv_stem_backward(do, x, weight, *tail)
    low = reference.conv_stem_backward(do, x, weight, *tail)
    high = reference.conv_stem_backward(do.double(), wide[0], wide[1], *tail)
    for a, lo, hi in zip(actual, low, high, strict=True):
        assert_no_worse(a, lo, hi, 3.0)


@pytest.mark.gpu
def test_default_backend_on_a_gpu_is_triton_and_deterministic():
    geometry = (64, 3, 64, 32, 32, 3, 1, 1, (3, 2, 1))
    tensors = inputs(geometry, torch.bfloat16, "cuda")

    def call(backend):
        return lambda *t: conv_stem(*t, stride=1, padding=1, backend=backend)

    do = torch.randn(64, 256, 64, device="cuda")
    runs = [with_gradients(call(b), tensors, do) for b in (None, "triton", "triton")]
    for tensors_of_one_name in zip(*runs, strict=True):
        assert all(torch.equal(t, tensors_of_one_name[0]) for t in tensors_of_one_name)
