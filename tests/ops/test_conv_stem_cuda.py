"""conv_stem's CUDA kernels: under the shim against fp64, their machine code, and on a GPU."""

import sys
from pathlib import Path

import conv_stem_shim as kernels
import pytest
import torch
from conv_stem_shim import shim

from lsmha_fast.ops import _dispatch, conv_stem
from lsmha_fast.ops._dispatch import BackendError
from lsmha_fast.ops.conv_stem import _cuda, op, reference
from lsmha_fast.testing import assert_no_worse, nan_filled_empty

sys.path.insert(0, str(Path(__file__).parents[2] / "csrc/cuda"))
sass = pytest.importorskip("sass")

needs_shim = pytest.mark.skipif(shim.unusable() is not None, reason=str(shim.unusable()))
needs_nvcc = pytest.mark.skipif(sass.unusable() is not None, reason=str(sass.unusable()))

# B, Cin, C, H, W; one pixel, odd sides, more than one tile of columns and group of channels, blocks
# of channels that end early
SHAPES = [
    (1, 3, 8, 1, 1),
    (2, 3, 72, 7, 5),
    (1, 1, 16, 33, 35),
    (3, 2, 24, 1, 18),
    (1, 3, 328, 6, 16),
]
GEOMETRY = 1, 1, [3, 2, 1]


def inputs(shape, dtype, device="cpu"):
    B, CIN, C, H, W = shape
    x = torch.randn(B, CIN, H, W)
    weight = torch.randn(C, CIN, 3, 3) * (9 * CIN) ** -0.5
    do = torch.randn(B, (H + 1) // 2 * ((W + 1) // 2), C)
    return [t.to(device, dtype) for t in (x, weight, torch.randn(C), do)]


def gradients(tensors, codes=None):
    """dweight and dbias by the reference, for these codes or its own."""
    x, weight, bias, do = tensors
    if codes is None:
        codes = reference.conv_stem(x, weight, bias, *GEOMETRY, True)[1]
    return reference.conv_stem_backward(do, x, weight, codes, *GEOMETRY, False, True)[1:]


def assert_matches_fp64(tensors, out, codes, grads):
    """Outputs against fp64; the place of a maximum may be another that is as large to 20 bits."""
    high = [t.double() for t in tensors]
    low_out, _ = reference.conv_stem(*tensors[:3], *GEOMETRY, True)
    high_out, high_codes = reference.conv_stem(*high[:3], *GEOMETRY, True)
    assert_no_worse(out, low_out, high_out)
    assert (codes != high_codes).float().mean() <= 1e-3
    for a, lo, hi in zip(grads, gradients(tensors), gradients(high, codes), strict=True):
        assert_no_worse(a, lo, hi, 3.0)


@needs_shim
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_fp64(shape, dtype):
    tensors = x, weight, bias, do = inputs(shape, dtype)
    out, codes = kernels.forward(x, weight, bias)
    grads = kernels.dweight(do, x, codes, shares=min(len(x), 2))
    assert_matches_fp64(tensors, out, codes, [g.to(dtype) for g in grads])


@needs_shim
def test_strips_and_blocks_change_nothing():
    x, weight, bias, do = inputs((3, 3, 8, 11, 34), torch.bfloat16)
    out, codes = kernels.forward(x, weight, bias)
    for strip, multiprocessors in ((1, 1), (4, 1), (1 << 20, 8)):
        again = kernels.forward(x, weight, bias, strip=strip, multiprocessors=multiprocessors)
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], codes)
    whole, strips = (kernels.dweight(do, x, codes, strip=n)[0] for n in (1 << 20, 4))
    torch.testing.assert_close(whole, strips)


@needs_shim
def test_views_no_bias_and_no_codes():
    x, weight, bias, do = inputs((2, 3, 8, 6, 7), torch.float16)
    expected, codes = kernels.forward(x, weight, torch.zeros_like(bias))
    for view in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert not view.is_contiguous()
        out, unwritten = kernels.forward(view, weight, None, need_codes=False)
        assert torch.equal(out, expected)
        assert (unwritten == 255).all()
        same = zip(kernels.dweight(do, view, codes), kernels.dweight(do, x, codes), strict=True)
        assert all(torch.equal(a, b) for a, b in same)


@needs_shim
def test_the_first_of_equal_sums_wins():
    x, weight, _, _ = inputs((2, 3, 16, 9, 9), torch.bfloat16)
    # halves: the sums are exact in 20 bits and many are equal
    x, weight = ((t * 2).round() / 2 for t in (x, weight))
    out, codes = kernels.forward(x, weight, None)
    expected, first = reference.conv_stem(x, weight, None, *GEOMETRY, True)
    assert torch.equal(out, expected)
    assert torch.equal(codes, first)


@needs_shim
def test_nan_is_not_swallowed_and_passes_no_gradient():
    x, weight, bias, _ = inputs((1, 3, 8, 9, 9), torch.bfloat16)
    x[0, 1, 4, 4] = torch.nan
    out, codes = kernels.forward(x, weight, bias)
    expected = reference.conv_stem(x, weight, bias, *GEOMETRY, False)[0]
    assert torch.equal(out.isnan(), expected.isnan())
    assert (codes[out.isnan()] == 9).all()


@needs_shim
def test_zero_outputs_pass_no_gradient():
    x, weight, bias, do = inputs(SHAPES[1], torch.float16)
    out, codes = kernels.forward(x, weight, bias - 100)
    assert not out.any()
    assert (codes == 9).all()
    for grad in kernels.dweight(do, x, codes):
        assert not grad.any()


# (kernel, registers, issue slots per sum of the convolution) as compiled, rounded up; three blocks
# of four warps fit a multiprocessor with up to 168 registers
BUDGETS = [
    ("conv_stem_forward<dev::Bf16, true>", 168, 10.0),
    ("conv_stem_forward<dev::Bf16, false>", 168, 8.5),
    ("conv_stem_forward<dev::Fp16, true>", 168, 10.0),
    ("conv_stem_forward<dev::Fp16, false>", 168, 8.5),
    ("conv_stem_dweight<dev::Bf16>", 144, 14.0),
    ("conv_stem_dweight<dev::Fp16>", 144, 14.0),
]


@needs_nvcc
@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_machine_code_keeps_its_budget(arch):
    found = sass.compile_kernels(Path(__file__).with_name("conv_stem_kernels.cu"), arch)
    for name, registers, slots in BUDGETS:
        (kernel,) = (k for n, k in found.items() if name in n)
        kernel.assert_clean(registers)
        # one iteration: two rows of 16 sums, 64 channels forward and 32 backward
        sums = 2 * 16 * (64 if "forward" in name else 32)
        loop = max(kernel.loops, key=lambda loop: loop.count("HMMA"))
        assert loop.count("HMMA") == (48 if "forward" in name else 16)
        assert loop.per_score(sums)["slots"] <= slots, f"{name}: {loop.per_score(sums)}"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stride": 2}, r"got 3, 2, 1, Pool\(kernel=3"),
        ({"pool": None}, r"got 3, 1, 1, Pool\(kernel=1"),
        ({"weight": torch.zeros(12, 3, 3, 3)}, r"weight \(12, 3, 3, 3\)"),
        ({"x": torch.zeros(1, 4, 8, 8), "weight": torch.zeros(8, 4, 3, 3)}, r"x \(1, 4, 8, 8\)"),
        ({"x": torch.zeros(1, 3, 8, 961)}, r"x \(1, 3, 8, 961\)"),
        ({"x": torch.zeros(1, 3, 8, 8, requires_grad=True)}, "no gradient of the images"),
        ({}, "needs a CUDA tensor"),
    ],
)
def test_a_call_that_the_kernels_cannot_run_is_refused(change, message):
    call = {"x": torch.zeros(1, 3, 8, 8), "weight": torch.zeros(8, 3, 3, 3)}
    call |= {"stride": 1, "padding": 1} | change
    with pytest.raises(BackendError, match=message):
        conv_stem(**call, backend="cuda")


def test_backend_calls_the_kernels(monkeypatch):
    """What lies between the public function and the kernels, without a GPU."""
    if shim.unusable() is not None:
        pytest.skip(str(shim.unusable()))

    class Kernels:
        @staticmethod
        def conv_stem(x, weight, bias, out, codes):
            made = kernels.forward(x, weight, bias, codes is not None)
            out.copy_(made[0])
            if codes is not None:
                codes.copy_(made[1])

        @staticmethod
        def conv_stem_dweight(do, x, codes, sums):
            shim.run(kernels.harness(), x=x, tokens=do, codes=codes, sums=sums, strip=1 << 20)

    monkeypatch.setattr(_cuda.torch.ops, "lsmha_fast_C_cuda", Kernels, raising=False)
    monkeypatch.setitem(op.CHECKS, "cuda", op.always)
    monkeypatch.setitem(_dispatch.LIBRARIES, "cuda", op.always)
    x, weight, bias, do = inputs(SHAPES[1], torch.bfloat16)
    for B in (2, 0):
        parameters = weight.requires_grad_(), bias.requires_grad_()
        results = []
        for backend in ("cuda", "reference"):
            out = conv_stem(x[:B], *parameters, stride=1, padding=1, backend=backend)
            results.append((out, *torch.autograd.grad(out, parameters, do[:B])))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2**-6, atol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 3, 256, 32, 32), (2, 3, 64, 224, 224)], ids=str)
def test_gpu_matches_fp64(shape, dtype):
    tensors = x, weight, bias, do = inputs(shape, dtype, "cuda")
    with nan_filled_empty():
        out, codes = _cuda.conv_stem(x, weight, bias, *GEOMETRY, True)
        _, *grads = _cuda.conv_stem_backward(do, x, weight, codes, *GEOMETRY, False, True)
    assert_matches_fp64(tensors, out, codes, grads)
    again, _ = _cuda.conv_stem(x, weight, bias, *GEOMETRY, False)
    assert torch.equal(again, out)


@pytest.mark.gpu
def test_gpu_default_opcheck_and_graph():
    x, weight, bias, do = inputs((4, 3, 64, 32, 32), torch.bfloat16, "cuda")
    assert op.CHECKS["cuda"](x, weight, 1, 1, op.CCT_POOL) is None
    arguments = x, weight, bias, *GEOMETRY, True, "cuda"
    torch.library.opcheck(torch.ops.lsmha_fast.conv_stem.default, arguments)
    out, codes = torch.ops.lsmha_fast.conv_stem(*arguments)
    backward = do, x, weight, codes, *GEOMETRY, False, True, "cuda"
    torch.library.opcheck(torch.ops.lsmha_fast.conv_stem_backward.default, backward)
    assert torch.equal(conv_stem(x, weight, bias, stride=1, padding=1), out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = conv_stem(x, weight, bias, stride=1, padding=1, backend="cuda")
    x.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(captured, out.flip(0))
