"""The CUDA backward kernels without a GPU: gradients under the shim, instructions under nvcc."""

import sys
from pathlib import Path

import pytest
import torch
from attention_bwd_shim import backward
from attention_fwd_shim import forward

from lsmha_fast.ops.attention import reference
from lsmha_fast.ops.attention.common import Inputs
from lsmha_fast.testing import assert_no_worse

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests/cuda"), str(ROOT / "csrc/cuda")]
import sass  # noqa: E402
import shim  # noqa: E402

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
needs_compiler = pytest.mark.skipif(shim.unusable() is not None, reason=str(shim.unusable()))
needs_nvcc = pytest.mark.skipif(sass.unusable() is not None, reason=str(sass.unusable()))


def make(shape, dtype, *, masked=False, head_scale=False, dropout_p=0.0):
    """do and inputs of shape (B, H, L, S, D); the last image has no keys if masked, the first head
    has scale 0 if there is one."""
    B, H, L, S, D = shape
    torch.manual_seed(sum(shape))
    q, k, v, do = (torch.randn(B, n, H, D).to(dtype).transpose(1, 2) for n in (L, S, S, L))
    mask = scale = None
    if masked:
        mask = torch.rand(B, S) > 0.3
        mask[-1] = False
    if head_scale:
        scale = torch.randn(H).to(dtype)
        scale[0] = 0
    seed = torch.tensor([0x123456789ABCDEF]) if dropout_p else None
    return do, Inputs(q, k, v, mask, None, scale, seed, dropout_p, D**-0.5)


def in_double(a):
    q, k, v, scale = (None if t is None else t.double() for t in (a.q, a.k, a.v, a.head_scale))
    return a._replace(q=q, k=k, v=v, head_scale=scale)


def unwritten(t):
    """Like `t` with the heads last in memory, all NaN."""
    B, H, N, D = t.shape
    return torch.full((B, N, H, D), torch.nan, dtype=t.dtype).transpose(1, 2)


def gradients(do, a, o, lse, **plan):
    buffers = [unwritten(t) for t in (a.q, a.k, a.v)]
    share = backward(do, a, o, lse, buffers, **plan)
    return buffers if share is None else [*buffers, share]


def expected(do, a, lse):
    buffers = [torch.full_like(t, torch.nan) for t in (a.q, a.k, a.v)]
    _, share = reference.attention_backward(do, a, None, lse, False, *buffers)
    return buffers if a.head_scale is None else [*buffers, share]


def assert_exact(do, a, results=None, **plan):
    """Gradients from the forward results, by default the true ones rounded to their types."""
    high = in_double(a)
    true_o, true_lse = reference.attention(high)
    o, lse = results or (true_o.to(a.q.dtype), true_lse.float())
    actual = gradients(do, a, o, lse, **plan)
    low = expected(do, a, true_lse.float())
    for x, y, z in zip(actual, low, expected(do.double(), high, true_lse), strict=True):
        assert_no_worse(x, y, z, factor=3)
    return actual


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 2, 3, 4, 5, 6, 7, 8, 13, 16])
def test_head_dims(D, dtype):
    assert_exact(*make((1, 3, 37, 70, D), dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [3, 4, 8, 16])
def test_every_option(D, dtype):
    """A mask, heads that are scaled or silent and dropout at once; images and heads without any
    part to play have gradients zero."""
    do, a = make((3, 2, 20, 150, D), dtype, masked=True, head_scale=True, dropout_p=0.2)
    *grads, share = assert_exact(do, a)
    for grad in grads:
        assert not grad[-1].any()
        assert not grad[:, 0].any()
    assert share[0] != 0
    hidden = ~a.key_mask[:, None, :, None].expand_as(a.k)
    assert not grads[1][hidden].any()
    assert not grads[2][hidden].any()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", [{"masked": True}, {"head_scale": True}, {"dropout_p": 0.7}])
def test_single_options(option, dtype):
    assert_exact(*make((2, 5, 33, 64, 4), dtype, **option))


@needs_compiler
@pytest.mark.parametrize("N", [17, 64, 100, 257, 300])
def test_tokens(N):
    for D, dtype in ((4, torch.bfloat16), (16, torch.float16)):
        assert_exact(*make((1, 2, N, N, D), dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [4, 8, 16])
def test_one_token(D, dtype):
    """dq and dk are differences of equal numbers, zero but for their rounding."""
    do, a = make((2, 3, 1, 1, D), dtype)
    o, lse = reference.attention(in_double(a))
    dq, dk, dv = gradients(do, a, o.to(dtype), lse.float())
    assert_no_worse(dv, do, do.double(), factor=3)
    rounding = torch.finfo(dtype).eps * (do.double() * a.v.double()).abs().sum(-1).max()
    assert dq.abs().max() <= rounding * a.k.abs().max()
    assert dk.abs().max() <= rounding * a.q.abs().max()


@needs_compiler
@pytest.mark.parametrize("N", [17, 257])
def test_tokens_fp32(N):
    assert_exact(*make((1, 1, N, N, 4), torch.float32))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [4, 8, 16])
def test_warps_share_a_head(D, dtype):
    """Two or four warps hand the sums of keys on; more queries than theirs take rounds."""
    do, a = make((2, 3, 150, 90, D), dtype, head_scale=True, dropout_p=0.1)
    results = reference.attention(in_double(a))
    results = [results[0].to(dtype), results[1].float()]
    for queries in (80, 48, 32, 16):
        first = assert_exact(do, a, results, queries=queries)
        again = gradients(do, a, *results, queries=queries)
        for x, y in zip(first, again, strict=True):
            assert torch.equal(x, y)


@needs_compiler
def test_a_large_device_gives_a_head_more_warps():
    for dtype in DTYPES:
        assert_exact(*make((1, 2, 150, 40, 8), dtype), multiprocessors=132)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [4, 8, 16])
def test_dropout_bits_equal_the_reference(D, dtype):
    """Equal logits and dO of 2^i: each of D channels of dV spells the bits of 8 queries exactly."""
    B, H, L, S = 2, 2, 8 * D + 40, 128
    do, a = make((B, H, L, S, D), dtype, dropout_p=0.5)
    kept = reference.keep_mask(a.seed, (B, H, L, S), 0.5)
    a = a._replace(q=torch.zeros_like(a.q))
    o, lse = reference.attention(in_double(a))
    for first in (0, L - 8 * D):
        do = torch.zeros_like(do)
        for c in range(D):
            for i in range(8):
                do[:, :, first + 8 * c + i, c] = 2**i
        dv = gradients(do, a, o.to(dtype), lse.float())[2]
        number = (dv.float() * S / 2).round().int()  # (B, H, S, D)
        bits = torch.stack([number >> i & 1 for i in range(8)], -1).flatten(3).transpose(2, 3)
        assert torch.equal(bits.bool(), kept[:, :, first : first + 8 * D])


@needs_compiler
@pytest.mark.parametrize("p", [1 / 65536, 65535 / 65536, 0.4999, 0.51, 1.0])
def test_dropout_at_the_ends_of_the_threshold(p):
    for dtype in DTYPES:
        do, a = make((1, 1, 33, 70, 4), dtype, dropout_p=p)
        grads = assert_exact(do, a)
        assert p < 1 or not any(grad.any() for grad in grads)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [3, 4, 5, 8, 16])
def test_packed_projections_are_read_and_written_in_place(D, dtype):
    B, H, N = 2, 3, 40
    torch.manual_seed(D)
    q, k, v = torch.randn(B, N, 3, H, D).to(dtype).transpose(1, 3).unbind(2)
    do = torch.randn(B, N, H, D).to(dtype).transpose(1, 2)
    a = Inputs(q, k, v, None, None, None, None, 0.0, D**-0.5)
    o, lse = reference.attention(in_double(a))
    o, lse = o.to(dtype), lse.float()
    plain = gradients(do, a, o, lse)
    # each of dq, dk and dv in a packed tensor of its own: the shim shares no storage
    packed = [torch.full((B, N, 3, H, D), torch.nan, dtype=dtype) for _ in range(3)]
    backward(do, a, o, lse, [t[:, :, i].transpose(1, 2) for i, t in enumerate(packed)])
    for i, t in enumerate(packed):
        assert torch.equal(t[:, :, i].transpose(1, 2), plain[i])
        assert t[:, :, [j for j in range(3) if j != i]].isnan().all()


@needs_compiler
@pytest.mark.parametrize("D", [4, 8])
def test_any_strides(D):
    for dtype in (torch.bfloat16, torch.float32):
        do, a = make((2, 3, 40, 41, D), dtype)
        odd = torch.randn(2, 3, 41, D + 3).to(dtype)
        mask = (torch.rand(41, 4) > 0.4)[:, ::2].T
        one = torch.randn(1, 41, 1, D).to(dtype).expand(2, 41, 3, D).transpose(1, 2)
        a = a._replace(q=odd[:, :, :40, 1 : D + 1], k=one, v=odd[..., :D], key_mask=mask)
        assert_exact(do.expand(2, 3, 40, D), a)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [4, 8, 16])
def test_logits_far_from_zero(D, dtype):
    """A weight of a masked or padded key must not count, whatever the row's sum."""
    for offset in (-200.0, 200.0):
        do, a = make((2, 1, 40, 70, D), dtype, masked=True)
        a.q[..., 0], a.k[..., 0] = offset, 1
        assert_exact(do, a._replace(scale=1.0))


@needs_compiler
@pytest.mark.parametrize("D", [1, 2, 4, 8])
def test_fp32_logits_keep_all_bits(D):
    """Peaked rows, and logits so large that two tf32 parts of q and k would show. At D = 1 plain
    fp32 rounds a dominating logit as it rounds lse, which hides the error of lse: less sharp."""
    for sharp in (1.0, 8.0 if D > 1 else 2.0):
        do, a = make((1, 1, 40, 70, D), torch.float32)
        assert_exact(do, a._replace(q=a.q * sharp, k=a.k * sharp))
    for offset in (-200.0, 200.0, -1e4, 1e4):
        far = a.k / 4 + offset * D**-0.5
        assert_exact(do, a._replace(q=torch.ones_like(a.q), k=far))


@needs_compiler
@pytest.mark.parametrize("D", [4, 8, 16])
def test_fp16_gradients_of_any_size(D):
    """dP and dS would leave fp16's range, at both ends, if dO came as it is."""
    for size in (2.0**-14, 2.0**13):
        do, a = make((1, 2, 40, 70, D), torch.float16, head_scale=True, dropout_p=0.1)
        do[:, 1] *= 2.0**-4
        assert_exact((do * size).clamp(-6e4, 6e4), a._replace(scale=a.scale / 8))
    for special in (torch.zeros_like(do), do.index_fill(2, torch.tensor([3]), torch.inf)):
        o, lse = reference.attention(in_double(a))
        dq, dk, dv = gradients(special, a, o.half(), lse.float())[:3]
        others = torch.arange(40) != 3
        assert not dv.isfinite().all() or not special.isinf().any()
        assert dq[:, :, others].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("D", [2, 8])
def test_large_queries(D, dtype):
    """The factor log2(e) takes q past the largest number of fp16."""
    do, a = make((1, 1, 16, 33, D), dtype)
    big = 60000.0 if dtype == torch.float16 else 1e30
    q = a.q.clone()
    q[:, :, 3] = big
    assert_exact(do, a._replace(q=q, k=a.k / big, scale=1.0))


@needs_compiler
def test_keys_that_take_no_part_may_be_anything():
    for dtype in DTYPES:
        do, a = make((2, 2, 20, 40, 4), dtype, masked=True)
        o, lse = reference.attention(in_double(a))
        o, lse = o.to(dtype), lse.float()
        hidden = ~a.key_mask[:, None, :, None]
        k, v = (t.masked_fill(hidden, torch.nan) for t in (a.k, a.v))
        spoilt = gradients(do, a._replace(k=k, v=v), o, lse)
        for x, y in zip(spoilt, gradients(do, a, o, lse), strict=True):
            assert torch.equal(x, y)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_the_forward_kernel(dtype):
    for D in (4, 8, 16):
        do, a = make((2, 2, 50, 70, D), dtype, masked=True, head_scale=True, dropout_p=0.1)
        assert_exact(do, a, forward(a))


# ---- what nvcc makes of them ----

SOURCE = ROOT / "csrc/cuda/attention_bwd.cu"
REGISTERS = {  # on sm_90a, (channels, dropout) of 16 bits: so that as many blocks fit as wanted
    (4, False): 168,
    (8, False): 168,
    (16, False): 255,
    (4, True): 255,
    (8, True): 255,
    (16, True): 255,
}
TILES = {  # keys and queries of a block: (channels, dropout)
    (4, False): (32, 256),
    (8, False): (32, 256),
    (16, False): (32, 128),
    (4, True): (64, 128),
    (8, True): (64, 128),
    (16, True): (32, 64),
}
SLOTS = {  # per score: (channels, dropout, exponentials of 8 by polynomial)
    (4, False, 0): 4.9,
    (4, False, 2): 6.7,
    (8, False, 0): 4.9,
    (8, False, 1): 6.4,
    (16, False, 0): 5.6,
    (4, True, 0): 10.2,
    (8, True, 0): 10.8,
    (16, True, 0): 16.0,
}


@needs_nvcc
@pytest.mark.parametrize("arch", sass.ARCHITECTURES)
def test_no_kernel_spills(arch):
    kernels = sass.compile_kernels(SOURCE, arch)
    assert len(kernels) == len(HALVES) * len(REGISTERS) + 4
    for (channels, dropout), registers in REGISTERS.items():
        of_width = f", {channels}, {str(dropout).lower()}, "
        found = [k for name, k in kernels.items() if of_width in _plain(name)]
        assert len(found) == len(HALVES)
        for kernel in found:
            kernel.assert_clean(registers if arch == "sm_90a" else 255)
    for kernel in kernels.values():
        kernel.assert_clean()


def _plain(name):
    return name.replace("(bool)0", "false").replace("(bool)1", "true").replace("(int)", "")


@needs_nvcc
def test_instructions_per_score(tmp_path):
    """Of the tiles alone: what a loop over half as many has less."""
    methods = {
        case: f"Half<dev::Bf16, {case[0]}, {str(case[1]).lower()}, {case[2]}>" for case in SLOTS
    }
    lines = ["template <class M> struct Fewer : M {"]
    lines += ["  static constexpr int kQueries = M::kQueries / 32 * 16;", "};"]
    for method in methods.values():
        for m in (method, f"Fewer<{method}>"):
            lines.append(f"template __global__ void attention_backward<{m}>(const Plan);")
    source = tmp_path / "tiles.cu"
    text = ['#include "attention_bwd.cuh"', "namespace attention::bwd {", *lines, "}"]
    source.write_text("\n".join(text) + "\n")
    kernels = sass.compile_kernels(source, "sm_90a")
    loops = {_plain(name).replace("attention::bwd::", ""): k.loop for name, k in kernels.items()}
    for case, budget in SLOTS.items():
        whole, fewer = (
            next(loop for name, loop in loops.items() if f"attention_backward<{m} >" in name)
            for m in (f"{methods[case]}", f"Fewer<{methods[case]} >")
        )
        keys, queries = TILES[case[:2]]
        scores = keys * (queries - queries // 32 * 16) / 32  # of one lane
        exponentials = whole.count("MUFU.EX2") - fewer.count("MUFU.EX2")
        assert exponentials / scores == 1 - case[2] / 8
        slots = (whole.slots - fewer.slots) / scores
        assert slots <= budget, (case, slots)
