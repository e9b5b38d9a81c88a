"""conv_stem by the native CPU kernels: against fp64 and the reference, every instruction set."""

import os
import subprocess
import sys

import pytest
import torch

from lsmha_fast._ext import ext_missing
from lsmha_fast.ops import conv_stem
from lsmha_fast.ops._dispatch import BackendError
from lsmha_fast.ops.conv_stem import op, reference
from lsmha_fast.testing import assert_no_worse, nan_filled_empty

pytestmark = pytest.mark.skipif(ext_missing() is not None, reason=str(ext_missing()))

# B, Cin, C, H, W, kernel, stride, padding, pool; every depth of a patch, blocks that end early,
# windows that leave the plane, that do not meet, that are wider than it
SHAPES = [
    (2, 3, 72, 32, 32, 3, 1, 1, (3, 2, 1)),
    (3, 3, 5, 7, 5, 3, 1, 1, (3, 2, 1)),
    (2, 4, 67, 9, 12, 3, 1, 1, (3, 2, 1)),
    (1, 5, 16, 6, 8, 3, 2, 0, None),
    (70, 1, 3, 5, 6, 3, 1, 1, (2, 2, 0)),
    (1, 1, 9, 11, 8, 5, 2, 3, (3, 1, 1)),
    (2, 1, 130, 4, 1, 3, 1, 1, (3, 2, 1)),
    (1, 2, 6, 14, 13, 3, 1, 1, (3, 5, 0)),
    (0, 3, 8, 8, 8, 3, 1, 1, (3, 2, 1)),
    (1, 3, 4, 20, 20, 1, 1, 2, (15, 4, 7)),
]


def inputs(shape, dtype=torch.float32):
    B, CIN, C, H, W, kernel = shape[:6]
    x = torch.randn(B, CIN, H, W).to(dtype)
    weight = (torch.randn(C, CIN, kernel, kernel) * (CIN * kernel**2) ** -0.5).to(dtype)
    return x, weight, torch.randn(C).to(dtype)


def options(shape):
    return dict(zip(("stride", "padding", "pool"), shape[6:], strict=True))


def run(tensors, do, backend, **opt):
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = conv_stem(*tensors, backend=backend, **opt)
    do = torch.randn_like(out) if do is None else do.to(out.dtype)
    return do, [out.detach(), *torch.autograd.grad(out, tensors, do)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape, dtype):
    tensors = inputs(shape, dtype)
    do, low = run(tensors, None, "reference", **options(shape))
    _, high = run([t.double() for t in tensors], do, "reference", **options(shape))
    with nan_filled_empty():
        _, actual = run(tensors, do, "cpp", **options(shape))
    for a, lo, hi, factor in zip(actual, low, high, (2.0, 3.0, 3.0, 3.0), strict=True):
        assert_no_worse(a, lo, hi, factor)
    assert torch.equal(conv_stem(*tensors, backend="cpp", **options(shape)), actual[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_of_the_reference(shape):
    x, weight, bias = inputs(shape)
    # halves: the sums are exact and many are equal
    x, weight, bias = ((t * 2).round() / 2 for t in (x, weight, bias))
    pool = list(shape[8] or (1, 1, 0))
    arguments = x, weight, bias, *shape[6:8], pool, True
    ops = torch.ops.lsmha_fast.conv_stem
    for actual, expected in zip(
        ops(*arguments, "cpp"), reference.conv_stem(*arguments), strict=True
    ):
        assert torch.equal(actual, expected)


def test_views_and_no_bias():
    shape = SHAPES[1]
    x, weight, _ = inputs(shape)
    _, expected = run((x, weight), torch.ones(3, 12, 5), "cpp", stride=1, padding=1)
    views = {
        "channels-last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second": torch.stack([x, x], 4).flatten(3)[..., ::2],
    }
    for name, view in views.items():
        assert torch.equal(view, x)
        assert not view.is_contiguous()
        tensors = view, weight.mT.contiguous().mT
        _, actual = run(tensors, torch.ones(3, 12, 5), "cpp", stride=1, padding=1)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), name
    # a gradient without strides of its own
    one = torch.ones(1, 1, 1).expand(3, 12, 5)
    _, actual = run((x, weight), one, "cpp", stride=1, padding=1)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_nan_and_infinity_are_those_of_the_reference():
    x, weight, bias = inputs(SHAPES[1])
    x[0, 0, 4, 4], x[1, 1, 2, 2], x[2, 2, 3, 0] = torch.nan, torch.inf, -torch.inf
    arguments = x, weight, bias, 1, 1, [3, 2, 1], True
    actual = torch.ops.lsmha_fast.conv_stem(*arguments, "cpp")[0]
    expected = reference.conv_stem(*arguments)[0]
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_does_not_depend_on_the_number_of_threads_or_the_batch():
    tensors = inputs((9, 3, 72, 16, 16, 3, 1, 1, (3, 2, 1)))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            do = results[0][0] if results else None
            results.append(run(tensors, do, "cpp", stride=1, padding=1))
    finally:
        torch.set_num_threads(threads)
    (do, one), (_, three) = results
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    x, *parameters = tensors
    alone = conv_stem(x[:1], *parameters, backend="cpp", stride=1, padding=1)
    assert torch.equal(alone, one[0][:1])


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_instruction_sets(capability):
    tests = "matches_fp64 or codes or nan"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", tests, __file__],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        check=True,
    )


def test_opcheck():
    x, weight, bias = inputs(SHAPES[1])
    ops = torch.ops.lsmha_fast
    arguments = x, weight, bias, 1, 1, [3, 2, 1]
    for need_codes in (True, False):
        torch.library.opcheck(ops.conv_stem.default, (*arguments, need_codes, "cpp"))
    out, codes = ops.conv_stem(*arguments, True, "cpp")
    for needed in ((True, True), (True, False), (False, True)):
        backward = out, x, weight, codes, 1, 1, [3, 2, 1], *needed, "cpp"
        torch.library.opcheck(ops.conv_stem_backward.default, backward)


def test_default_on_a_cpu_and_what_it_leaves_to_the_reference(monkeypatch):
    asked, call = [], op.call
    monkeypatch.setattr(op, "call", lambda *a: asked.append(a[-1]) or call(*a))
    x, weight, bias = inputs(SHAPES[1])
    conv_stem(x, weight, bias, stride=1, padding=1)
    conv_stem(x.half(), weight.half(), bias.half(), stride=1, padding=1)
    x, weight, bias = inputs((1, 6, 4, 8, 8, 3))
    conv_stem(x, weight, bias, stride=1, padding=1)
    assert asked == ["cpp", "reference", "reference"]
    with pytest.raises(BackendError, match=r"at most 47 products, weight is \(4, 6, 3, 3\)"):
        conv_stem(x, weight, bias, stride=1, padding=1, backend="cpp")
