"""The CUDA forward kernels without a GPU: results under the shim, instructions under nvcc."""

import math
import sys
from pathlib import Path

import pytest
import torch
from attention_fwd_shim import forward

from lsmha_fast.ops import attention
from lsmha_fast.ops._dispatch import BackendError
from lsmha_fast.ops.attention import reference
from lsmha_fast.ops.attention.common import Inputs
from lsmha_fast.testing import assert_no_worse

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests/cuda"), str(ROOT / "csrc/cuda")]
import sass  # noqa: E402
import shim  # noqa: E402

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
needs_compiler = pytest.mark.skipif(shim.unusable() is not None, reason=str(shim.unusable()))
needs_nvcc = pytest.mark.skipif(sass.unusable() is not None, reason=str(sass.unusable()))


def make(shape, dtype, *, masked=False, head_scale=False, dropout_p=0.0, sharp=1.0, packed=False):
    """Inputs of shape (B, H, L, S, D); the last image has no keys if masked."""
    B, H, L, S, D = shape
    torch.manual_seed(sum(shape))
    if packed:
        q, k, v = torch.randn(B, L, 3, H, D).to(dtype).transpose(1, 3).unbind(2)
    else:
        q, k, v = (torch.randn(B, n, H, D).to(dtype).transpose(1, 2) for n in (L, S, S))
    mask = None
    if masked:
        mask = torch.rand(B, S) > 0.3
        mask[-1] = False
    scale = torch.randn(H) if head_scale else None
    seed = torch.tensor([0x123456789ABCDEF]) if dropout_p else None
    return Inputs(q * sharp, k * sharp, v, mask, None, scale, seed, dropout_p, D**-0.5)


def in_double(a):
    q, k, v, scale = (
        None if t is None else t.double() for t in (a.q, a.k, a.v, a.head_scale)
    )  # fmt: skip
    return a._replace(q=q, k=k, v=v, head_scale=scale)


def assert_exact(a, **plan):
    o, lse = forward(a, **plan)
    (low, low_lse), (high, high_lse) = reference.attention(a), reference.attention(in_double(a))
    assert_no_worse(o, low, high)
    empty = high_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    # the sum is that of the weights as they were rounded for the product with v
    rounded = 4 * torch.finfo(a.q.dtype).eps / math.sqrt(a.k.shape[2])
    error = (lse - high_lse).masked_fill(empty, 0).abs().max()
    assert error <= rounded + 8 * (low_lse - high_lse).masked_fill(empty, 0).abs().max()
    return o, lse


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 2, 3, 4, 5, 8, 13, 16])
def test_head_dims(D, dtype):
    assert_exact(make((1, 3, 37, 70, D), dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [3, 4, 8, 16])
def test_every_option(D, dtype):
    options = {"masked": True, "head_scale": True, "dropout_p": 0.2}
    o, _ = assert_exact(make((3, 2, 20, 150, D), dtype, **options))
    assert not o[-1].any()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [4, 16])
def test_keys_in_chunks(D, dtype):
    """Each with row maxima of its own; one image has keys in the third chunk only."""
    a = make((3, 1, 40, 250, D), dtype, masked=True, dropout_p=0.3)
    a.key_mask[1, :128] = a.key_mask[1, 192:] = False
    assert_exact(a, keys=64)
    q, k = torch.ones_like(a.q), (a.k / 4 - 20).to(dtype)
    assert_exact(a._replace(q=q, k=k), keys=64)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [64, 1024])
@pytest.mark.parametrize("D", [1, 4, 8, 16])
def test_sharp_rows_need_exact_maxima(D, keys, dtype):
    a = make((2, 1, 40, 130, D), dtype, masked=True, sharp=8.0)
    assert_exact(a, keys=keys)
    # logits far below and above zero: masked and padded keys must not be the maximum
    for offset in (-200.0, 200.0):
        q, k = torch.full_like(a.q, 1.0), torch.full_like(a.k, offset * D**-0.5)
        k += torch.randn(k.shape) / 4
        assert_exact(a._replace(q=q, k=k.to(dtype)), keys=keys)


@needs_compiler
@pytest.mark.parametrize("D", [1, 2, 4, 5, 8, 16])
def test_fp32_logits_keep_all_bits(D):
    """Two tf32 parts hold 22 bits of fp32's 24: a third part shows where logits are large."""
    for offset in (-200.0, 200.0, -1e4, 1e4):
        a = make((1, 1, 40, 70, D), torch.float32)
        far = a.k / 4 + offset * D**-0.5
        assert_exact(a._replace(q=torch.ones_like(a.q), k=far))
        one = a.q / 4  # one channel alone carries the logits
        one[..., 0] = offset
        assert_exact(a._replace(q=one, k=a.k / 4 + 1, scale=1.0))


@needs_compiler
def test_one_sharp_tile_of_many():
    a = make((1, 1, 96, 100, 4), torch.bfloat16)
    a.q[:, :, 40] *= 64
    assert_exact(a)


@needs_compiler
@pytest.mark.parametrize("D", [4, 16])
def test_weights_that_fp16_cannot_hold(D):
    """Most of the weight is on keys whose 2^score alone is below or above fp16's range."""
    for mean in (-20.0, 20.0):
        a = make((1, 1, 16, 90, D), torch.float16)
        q, k = torch.full_like(a.q, mean / D**0.5), a.k / 8 + 1
        assert_exact(a._replace(q=q, k=k, scale=1.0))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_and_small_inputs(dtype):
    a = make((1, 1, 16, 33, 2), dtype)
    big = 60000.0 if dtype == torch.float16 else 1e30
    k = a.k.clone()
    k[:, :, 5] = big
    assert_exact(a._replace(q=a.q / big, k=k, scale=1.0))
    assert_exact(a._replace(v=a.v * (big / 8)))


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 4), (2, 1, 1, 65, 1), (1, 5, 33, 1, 16)])
@pytest.mark.parametrize("dropout_p", [0.0, 1.0, 1e-9])
def test_smallest_shapes(shape, dropout_p):
    for dtype in DTYPES:
        a = make(shape, dtype, dropout_p=dropout_p)
        if dropout_p == 1e-9:  # rounds to 0, which the operator's caller takes for no dropout
            a = a._replace(seed=None)
        assert_exact(a)


@needs_compiler
@pytest.mark.parametrize("D", [3, 4, 5, 8, 16])
def test_packed_projections_are_read_in_place(D):
    for dtype in DTYPES:
        assert_exact(make((2, 3, 40, 40, D), dtype, packed=True))


@needs_compiler
@pytest.mark.parametrize("D", [4, 8])
def test_any_strides(D):
    a = make((2, 3, 40, 41, D), torch.bfloat16)
    odd = torch.randn(2, 3, 41, D + 3).bfloat16()
    q = odd[:, :, :40, 1 : D + 1]
    k = torch.randn(1, 41, 1, D).bfloat16().expand(2, 41, 3, D).transpose(1, 2)
    mask = (torch.rand(41, 4) > 0.4)[:, ::2].T
    assert_exact(a._replace(q=q, k=k, v=odd[..., :D], key_mask=mask))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 4, 8])
def test_the_plan_changes_no_bit(D, dtype):
    """One warp takes all queries of a head, or the blocks of many multiprocessors share them."""
    a = make((1, 6, 300, 70, D), dtype, dropout_p=0.1)
    whole = forward(a)
    for multiprocessors in (2, 132):
        for x, y in zip(whole, forward(a, multiprocessors=multiprocessors), strict=True):
            assert torch.equal(x, y)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [4, 8, 16])
def test_dropout_bits_equal_the_reference(D, dtype):
    """Logits of zero and values of 2^j: each of D outputs spells the bits of 8 keys, exactly."""
    B, H, L, S = 2, 2, 50, 128
    a = make((B, H, L, S, D), dtype, dropout_p=0.5)
    expected = reference.keep_mask(a.seed, (B, H, L, S), 0.5)
    a = a._replace(q=torch.zeros_like(a.q))
    for first in range(0, S, 8 * D):
        v = torch.zeros_like(a.v)
        for c in range(D):
            for j in range(8):
                v[:, :, first + 8 * c + j, c] = 2**j
        number = (forward(a._replace(v=v))[0].float() * S / 2).int()
        bits = torch.stack([number >> j & 1 for j in range(8)], -1).flatten(3)
        assert torch.equal(bits.bool(), expected[..., first : first + 8 * D])


@needs_compiler
def test_dropout_at_the_ends_of_the_threshold():
    for p in (1 / 65536, 65535 / 65536, 0.4999, 0.51):
        a = make((1, 1, 33, 70, 4), torch.float32, dropout_p=p)
        assert_exact(a)


@needs_compiler
def test_values_that_take_no_part_may_be_anything():
    a = make((2, 2, 20, 40, 4), torch.bfloat16, masked=True)
    hidden = ~a.key_mask[:, None, :, None]
    k, v = (t.masked_fill(hidden, math.nan) for t in (a.k, a.v))
    for x, y in zip(forward(a._replace(k=k, v=v)), forward(a), strict=True):
        assert torch.equal(x, y)


@needs_compiler
def test_what_is_not_a_number_stays_visible():
    a = make((1, 2, 20, 40, 4), torch.bfloat16)
    a.k[0, 1, 7, 2] = math.nan
    o, _ = forward(a)
    assert o[0, 1].isnan().all()
    assert o[0, 0].isfinite().all()


def test_refusals():
    q = torch.zeros(1, 2, 8, 4)
    for options, reason in (
        ({}, "needs a CUDA tensor, got one on cpu"),
        ({"bias": torch.zeros(8, 8)}, "takes? no bias"),
    ):
        with pytest.raises(BackendError, match=reason):
            attention(q, q, q, backend="cuda", **options)
    wide = torch.zeros(1, 2, 8, 17)
    with pytest.raises(BackendError, match="head dim 17 exceeds 16"):
        attention(wide, wide, wide, backend="cuda")


# ---- what nvcc makes of them ----

SOURCE = ROOT / "csrc/cuda/attention_fwd.cu"
REGISTERS = {  # (channels, dropout, fp32): so that as many blocks fit as the launch bounds say
    (4, False, False): 128,
    (8, False, False): 168,
    (16, False, False): 168,
    (4, True, False): 168,
    (8, True, False): 168,
    (16, True, False): 255,
    (4, False, True): 128,
    (8, False, True): 168,
    (16, False, True): 255,
    (4, True, True): 255,
    (8, True, True): 255,
    (16, True, True): 255,
}
# per score, what exact maxima add: fp32 logits of more than 4 channels get their third parts then
EXACT_SLOTS = {(8, False, True): 0.6, (16, False, True): 1.4, (16, True, True): 2.7}
SLOTS = {  # per score, of the path without row maxima
    (4, False, False): 4.1,
    (8, False, False): 4.3,
    (16, False, False): 4.9,
    (4, True, False): 8.0,
    (8, True, False): 8.3,
    (16, True, False): 9.0,
    (4, False, True): 7.0,
    (8, False, True): 8.0,
    (16, False, True): 11.0,
    (4, True, True): 15.5,
    (8, True, True): 16.5,
    (16, True, True): 19.5,
}


def variants(arch):
    for name, kernel in sass.compile_kernels(SOURCE, arch).items():
        arguments = name.partition("<")[2].partition(">")[0].replace("(", "").split(", ")
        dtype, channels, dropout, emulated = (a.rpartition(")")[2] for a in arguments)
        yield dtype, int(channels), dropout in ("1", "true"), int(emulated), kernel


@needs_nvcc
@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_no_kernel_spills(arch):
    found = list(variants(arch))
    assert len(found) == len(DTYPES) * 6
    for dtype, channels, dropout, _, kernel in found:
        kernel.assert_clean(REGISTERS[channels, dropout, dtype == "float"])


@needs_nvcc
def test_instructions_per_score():
    for dtype, channels, dropout, emulated, kernel in variants("sm_90a"):
        keys = 64 if dropout else 32
        weighing = [loop for loop in kernel.loops if loop.count("MUFU.EX2")]
        assert len(weighing) == 2, kernel.name
        for exact, loop in enumerate(sorted(weighing, key=lambda loop: loop.slots)):
            per_score = loop.per_score(keys * 32)
            assert per_score["mufu"] == 1 - emulated / 8
            case = channels, dropout, dtype == "float"
            budget = SLOTS[case] + exact * EXACT_SLOTS.get(case, 0.4)
            assert per_score["slots"] <= budget, (kernel.name, per_score)


@needs_nvcc
def test_instructions_without_polynomials(tmp_path):
    """All exponentials on their own unit: the other instructions of 1 to 8 channels."""
    source = tmp_path / "plain.cu"
    kernels = (f"attention_forward<dev::Bf16, {D}, false, 0>(const ForwardPlan)" for D in (4, 8))
    lines = [f"template __global__ void {kernel};" for kernel in kernels]
    text = ['#include "attention_fwd.cuh"', "namespace attention {", *lines, "}"]
    source.write_text("\n".join(text) + "\n")
    for kernel in sass.compile_kernels(source, "sm_90a").values():
        weighing = [loop for loop in kernel.loops if loop.count("MUFU.EX2")]
        per_score = min((loop.per_score(1024) for loop in weighing), key=lambda n: n["slots"])
        assert per_score["mufu"] == 1
        assert per_score["slots"] <= 2.7, (kernel.name, per_score)
