"""The native CPU kernels of attention."""

import os
import subprocess
import sys
import time

import pytest
import torch
from attention_cases import SEED, assert_backend_is_exact, make_inputs, packed, run
from torch.autograd import gradcheck

from lsmha_fast import _ext
from lsmha_fast.ops import attention, attention_packed
from lsmha_fast.ops.attention import op, reference
from lsmha_fast.testing import assert_no_worse, nan_filled_empty

pytestmark = pytest.mark.skipif(_ext.ext_missing() is not None, reason=str(_ext.ext_missing()))

DTYPES = [torch.float32, torch.bfloat16]
HEAD_DIMS = [*range(1, 34), 40, 64, 100]
OPTIONS = [
    {},
    {"masked": True},
    {"bias": (3, 70, 70)},
    {"dropout_p": 0.5},
    {"head_scale": True},
    {"masked": True, "dropout_p": 0.1},
]
BIASES = [(6, 65, 70), (2, 1, 1, 70), (65, 70), (2, 6, 1, 70), (2, 6, 65, 70)]


def check(shape, dtype, function=attention, grow=1.0, **options):
    tensors, options = make_inputs(shape, dtype, **options)
    tensors = [(t * grow).to(dtype).double() for t in tensors[:2]] + tensors[2:]
    if function is attention_packed:
        tensors = packed(tensors)
    with nan_filled_empty():
        assert_backend_is_exact("cpp", dtype, tensors, options, function)


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims(D, dtype):
    check((2, 2, 35, 35, D), dtype, masked=D % 2 == 0)


@pytest.mark.parametrize(
    "L, S", [(3, 3), (17, 17), (196, 196), (257, 257), (1, 65), (70, 1030), (300, 17)]
)
@pytest.mark.parametrize("D", [1, 4, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(L, S, D, dtype):
    check((1, 2, L, S, D), dtype)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("D", [1, 3, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options_together(dtype, D, bias):
    # six heads: the worst of few gradients of a head's scale would say little
    check((2, 6, 65, 70, D), dtype, masked=True, bias=bias, head_scale=True, dropout_p=0.2)


@pytest.mark.parametrize("bias", [(2, 65, 1), (1,)])
def test_bias_that_shifts_whole_rows(bias):
    """Softmax ignores it, so its gradient is zero but for the rounding of what sums up to zero:
    at most a few roundings of each term of ds = p (dp - delta), delta = rowsum(do o)."""
    tensors, options = make_inputs((2, 2, 65, 66, 3), torch.float32, bias=bias)
    dbias = run("cpp", torch.float32, tensors, options)[4]
    q, k, v, do = tensors
    p = torch.softmax(q @ k.mT * 3**-0.5, -1)
    terms = p * ((do.abs() @ v.mT.abs()) + (do.abs() * (p @ v).abs()).sum(-1, keepdim=True))
    assert (dbias.abs() <= 2**-23 * terms.sum_to_size(dbias.shape)).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("D", [1, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed(dtype, D, options):
    check((2, 3, 70, 70, D), dtype, attention_packed, **options)


@pytest.mark.parametrize("D", [1, 4, 8, 32])
@pytest.mark.parametrize("options", [{}, {"masked": True, "dropout_p": 0.2}])
def test_large_logits(D, options):
    """Beyond what exponentials of an unshifted sum can hold: the largest logit is subtracted."""
    check((2, 2, 40, 150, D), torch.float32, grow=12.0, **options)


@pytest.mark.parametrize("D", [2, 16])
def test_large_bias(D):
    """Whole rows of the bias are large, as additive masks of finite numbers have them."""
    tensors, options = make_inputs((2, 3, 40, 90, D), torch.float32, bias=(3, 40, 90))
    options["bias"][:, ::3] -= 30000.0
    options["bias"][:, 1::3] += 300.0
    assert_backend_is_exact("cpp", torch.float32, tensors, options)


@pytest.mark.parametrize("D", [4, 16])
def test_extreme_logits_stay_finite(D):
    q = torch.full((1, 1, 20, D), 1e4)
    k = torch.randn(1, 1, 30, D).sign() * 1e4
    v = torch.randn(1, 1, 30, D)
    o = attention(q, k, v, backend="cpp")
    expected = attention(*(t.double() for t in (q, k, v)), backend="reference")
    torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [2, 16])
def test_bias_may_hold_minus_infinity(D, dtype):
    tensors, options = make_inputs((2, 3, 20, 33, D), dtype, bias=(3, 20, 33))
    options["bias"][:, 1] = -torch.inf  # one query without keys
    options["bias"][:, 2, 3:] = -torch.inf
    with nan_filled_empty():
        actual = run("cpp", dtype, tensors, options)
    expected = run("reference", torch.float64, tensors, options)
    o, dq, _, _, dbias = actual
    assert (o[:, :, 1] == 0).all()
    assert (dq[:, :, 1] == 0).all()
    assert (dbias[:, 2, 3:] == 0).all()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("D", [1, 3, 16])
def test_double_precision(D, options):
    options = {k: (2, 20, 23) if k == "bias" else v for k, v in options.items()}
    tensors, options = make_inputs((2, 2, 20, 23, D), torch.float64, **options)
    with nan_filled_empty():
        actual = run("cpp", torch.float64, tensors, options)
    # the reference multiplies by dropout's factor in float
    tolerance = 1e-6 if options["dropout_p"] else 1e-12
    for a, e in zip(actual, run("reference", torch.float64, tensors, options), strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [(3, 4, 5), (2, 1, 1, 5), (1, 3, 4, 1)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradient(bias, dropout_p):
    options = {"masked": True, "bias": bias, "head_scale": True}
    tensors, options = make_inputs((2, 3, 4, 5, 2), torch.float64, **options)

    def call(q, k, v, bias, head_scale):
        torch.manual_seed(0)
        mask = options["key_mask"]
        return attention(
            q, k, v, key_mask=mask, bias=bias, head_scale=head_scale, dropout_p=dropout_p,
            scale=0.7, backend="cpp",
        )  # fmt: skip

    inputs = [*tensors[:3], options["bias"], options["head_scale"]]
    assert gradcheck(call, [t.clone().requires_grad_() for t in inputs])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("D", [4, 16])
def test_log_sum_exp(D, dtype):
    tensors, options = make_inputs((2, 3, 20, 33, D), dtype, masked=True)
    q, k, v = (t.to(dtype) for t in tensors[:3])
    arguments = (options["key_mask"], None, None, None, 0.0, 0.5)
    with nan_filled_empty():
        _, lse = torch.ops.lsmha_fast.attention(q, k, v, *arguments, "cpp")
    high = torch.ops.lsmha_fast.attention(*tensors[:3], *arguments, "reference")[1]
    _, low = torch.ops.lsmha_fast.attention(q, k, v, *arguments, "reference")
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (lse[-1] == -torch.inf).all()
    if dtype == torch.float64:
        torch.testing.assert_close(lse, high)
    else:
        assert_no_worse(lse[:-1], low[:-1], high[:-1])


@pytest.mark.parametrize("shape", [(0, 2, 3, 3, 4), (2, 2, 0, 3, 4), (2, 2, 3, 0, 4)])
def test_empty_dimensions_give_zeros(shape):
    tensors, options = make_inputs(shape, torch.float32, head_scale=True, bias=(1, 2, 1, 1))
    with nan_filled_empty():
        o, *grads = run("cpp", torch.float32, tensors, options)
    assert o.shape == (*shape[:3], shape[4])
    assert all((t == 0).all() for t in (o, *grads))


def test_one_token():
    # the softmax of one key is 1: o = v and dv = do up to the rounding of the weight and its sum,
    # and dq, dk are noise around zero
    tensors, options = make_inputs((2, 3, 1, 1, 4), torch.float32)
    q, k, v, do = (t.float() for t in tensors)
    o, dq, dk, dv = run("cpp", torch.float32, tensors, options)
    torch.testing.assert_close(o, v)
    torch.testing.assert_close(dv, do)
    noise = 8 * 2**-24 * (do.abs() * v.abs()).sum(-1, keepdim=True)
    assert (dq.abs() <= noise * k.abs()).all()
    assert (dk.abs() <= noise * q.abs()).all()


@pytest.mark.parametrize("D", [1, 4, 16])
def test_strided_views(D):
    """Expanded, transposed to a strided last dimension, sliced out of wider tensors."""
    B, H, L, S = 2, 3, 20, 33
    q = torch.randn(B, H, D, L).mT
    k = torch.randn(1, H, S, D).expand(B, H, S, D)
    v = torch.randn(B, S, H, D + 3)[..., 1 : D + 1].transpose(1, 2)
    strided = [t.detach().requires_grad_() for t in (q, k, v)]
    dense = [t.detach().contiguous().requires_grad_() for t in (q, k, v)]
    do = torch.randn(B, H, L, 1).expand(B, H, L, D)
    results = []
    for inputs in (strided, dense):
        o = attention(*inputs, backend="cpp")
        results.append((o, *torch.autograd.grad(o, inputs, do)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_packed_is_read_and_its_gradient_written_in_place():
    """No copy of the projection is made on the way, and all of the gradient is one tensor."""
    qkv = torch.randn(2, 20, 3, 4, 8).requires_grad_()
    o = attention_packed(qkv, backend="cpp")
    assert o.is_contiguous()
    (dqkv,) = torch.autograd.grad(o, qkv, torch.randn_like(o))
    assert dqkv.is_contiguous()
    arguments = (None, None, None, None, 0.0, 1.0, "cpp")
    with torch.profiler.profile() as profile:
        torch.ops.lsmha_fast.attention_packed(qkv.detach(), *arguments)
    names = {event.name for event in profile.events()}
    assert "lsmha_fast::attention_packed" in names
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous"}


def kernel_keep_masks(shape, dropout_p, D):
    """The masks that forward and backward apply: with equal logits, unit vectors as values make
    the output show the weights, and as output gradients they make dv show them."""
    B, H, L, S = shape
    forward, backward = [], []
    for first in range(0, max(L, S), D):
        q, k = (torch.zeros(B, H, n, D) for n in (L, S))
        unit = torch.eye(max(L, S) + D)
        v = unit[:S, first : first + D].expand(B, H, S, D).clone().requires_grad_()
        do = unit[:L, first : first + D].expand(B, H, L, D)
        torch.manual_seed(SEED)
        o = attention(q, k, v, dropout_p=dropout_p, backend="cpp")
        forward.append(o.detach() > 0)
        backward.append(torch.autograd.grad(o, v, do)[0].mT > 0)
    return torch.cat(forward, -1)[..., :S], torch.cat(backward, -2)[..., :L, :]


@pytest.mark.parametrize("D", [8, 64])
@pytest.mark.parametrize("shape", [(2, 2, 65, 130), (1, 3, 5, 40)])
def test_dropout_bits_equal_the_reference(shape, D):
    torch.manual_seed(SEED)
    seed = torch.randint(2**63 - 1, (1,))
    expected = reference.keep_mask(seed, shape, 0.3)
    forward, backward = kernel_keep_masks(shape, 0.3, D)
    assert torch.equal(forward, expected)
    assert torch.equal(backward, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dropping_everything_gives_zeros(dtype):
    tensors, options = make_inputs((1, 2, 5, 7, 4), dtype, dropout_p=1.0)
    assert all((t == 0).all() for t in run("cpp", dtype, tensors, options))


@pytest.mark.parametrize("D", [4, 16])
def test_nan_stays_in_its_row(D):
    tensors, _ = make_inputs((1, 2, 70, 70, D), torch.float32)
    q, k, v, _ = (t.float() for t in tensors)
    clean = attention(q, k, v, backend="cpp")
    q[0, 0, 3] = torch.nan
    o = attention(q, k, v, backend="cpp")
    assert o[0, 0, 3].isnan().all()
    clean[0, 0, 3] = o[0, 0, 3] = 0
    assert torch.equal(o, clean)


EVERYTHING = {"bias": (2, 66, 66), "head_scale": True, "dropout_p": 0.2, "masked": True}


@pytest.mark.parametrize("D", [1, 4, 8, 16])
@pytest.mark.parametrize("options", [{}, {"masked": True, "dropout_p": 0.2}, EVERYTHING])
def test_result_does_not_depend_on_the_number_of_threads(D, options):
    tensors, options = make_inputs((2, 18, 66, 66, D), torch.float32, **_heads(options, 18))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(run("cpp", torch.float32, tensors, options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def _heads(options, H):
    return options | {"bias": (H, 66, 66)} if "bias" in options else options


@pytest.mark.parametrize("D", [1, 4, 16])
def test_result_does_not_depend_on_the_batch(D):
    tensors, options = make_inputs((3, 5, 66, 66, D), torch.float32)
    whole = run("cpp", torch.float32, tensors, options)
    alone = run("cpp", torch.float32, [t[1:2] for t in tensors], options)
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a[1:2], b)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_instruction_sets(capability, tmp_path):
    cases = []
    for D in (1, 2, 4, 8, 13, 32):
        for options in ({}, {"masked": True, "dropout_p": 0.3, "head_scale": True}):
            cases.append(make_inputs((2, 2, 37, 41, D), torch.float32, **options))
    cases.append(
        make_inputs((2, 2, 65, 70, 3), torch.float32, **EVERYTHING | {"bias": (2, 65, 70)})
    )
    torch.save(cases, tmp_path / "cases.pt")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[3]); from attention_cases import run;"
        "cases = torch.load(sys.argv[1]);"
        "torch.save([run('cpp', torch.float32, *case) for case in cases], sys.argv[2])"
    )
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    paths = [str(tmp_path / "cases.pt"), str(tmp_path / "out.pt"), os.path.dirname(__file__)]
    subprocess.run([sys.executable, "-c", code, *paths], env=env, check=True)
    for actual, case in zip(torch.load(paths[1]), cases, strict=True):
        low = run("reference", torch.float32, *case)
        high = run("reference", torch.float64, *case)
        for i, (a, l, h) in enumerate(zip(actual, low, high, strict=True)):
            assert_no_worse(a, l, h, factor=2 if i == 0 else 3)


def operator_cases():
    (q, k, v, do), options = make_inputs((2, 3, 4, 5, 2), torch.float32, masked=True,
                                         bias=(1, 3, 4, 5), head_scale=True)  # fmt: skip
    q, k, v, do, bias, scale = (
        t.float() for t in (q, k, v, do, options["bias"], options["head_scale"])
    )
    every = (options["key_mask"], bias, scale, torch.tensor([5]), 0.2, 0.5)
    o, lse = torch.ops.lsmha_fast.attention(q, k, v, *every, "cpp")
    qkv, dout = packed([k, k, v, v])
    plain = (None, None, scale, None, 0.0, 0.5)
    packed_o, packed_lse = torch.ops.lsmha_fast.attention_packed(qkv, *plain, "cpp")
    yield "attention", (q, k, v, *every, "cpp")
    yield "attention_backward", (do, q, k, v, *every, o, lse, True, "cpp")
    yield "attention_packed", (qkv, *plain, "cpp")
    saved = (packed_o, packed_lse, False)
    yield "attention_packed_backward", (dout, qkv, *plain, *saved, "cpp")


def test_operators_are_registered_right():
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    for name, arguments in operator_cases():
        operator = getattr(torch.ops.lsmha_fast, name).default
        torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", ["cpp", None])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiles_whole(dropout_p, backend):
    def loss(q, k, v, qkv):
        options = {"dropout_p": dropout_p, "backend": backend}
        o = attention(q, k, v, **options)
        return o.square().sum() + attention_packed(qkv, **options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (2, 3):
        tensors, _ = make_inputs((B, 3, 4, 4, 2), torch.float32)
        inputs = [*tensors[:3], packed(tensors)[0]]
        results = []
        for call in (loss, compiled):
            leaves = [t.float().requires_grad_() for t in inputs]
            torch.manual_seed(0)
            value = call(*leaves)
            results.append((value, *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(*results)


def _raw(**changes):
    q = torch.zeros(2, 3, 4, 5)
    arguments = {
        "q": q, "k": q, "v": q, "key_mask": None, "bias": None, "head_scale": None, "seed": None,
        "dropout_p": 0.0, "scale": 1.0,
    }  # fmt: skip
    return arguments | changes


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(3, 4, 5)}, "q must be"),
        ({"q": torch.zeros(2, 3, 4, 5).half()}, "q must be float32, bfloat16 or float64"),
        ({"k": torch.zeros(2, 3, 4, 6)}, "k must be"),
        ({"v": torch.zeros(2, 3, 3, 5)}, "v must be"),
        ({"v": torch.zeros(2, 3, 4, 5).double()}, "v must be"),
        ({"key_mask": torch.zeros(2, 5, dtype=torch.bool)}, "key_mask has the wrong shape"),
        ({"key_mask": torch.zeros(2, 4)}, "key_mask has the wrong shape, dtype"),
        ({"bias": torch.zeros(1, 3, 4, 3)}, "bias has the wrong shape"),
        ({"bias": torch.zeros(4, 4)}, "bias has the wrong shape"),
        ({"head_scale": torch.zeros(2)}, "head_scale has the wrong shape"),
        ({"seed": torch.zeros(1)}, "seed has the wrong shape, dtype"),
        (
            {"seed": torch.zeros(1, dtype=torch.int64), "dropout_p": -0.5},
            "dropout_p must be a probability",
        ),
    ],
)
def test_raw_operator_refuses_what_would_read_out_of_bounds(change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lsmha_fast.attention.cpp(**_raw(**change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"do": torch.zeros(2, 3, 5, 5)}, "do must be"),
        ({"o": torch.zeros(2, 3, 4, 5).double()}, "o must be"),
        ({"lse": torch.zeros(2, 3, 5)}, "lse has the wrong shape"),
        ({"lse": torch.zeros(2, 3, 4).double()}, "lse has the wrong shape, dtype"),
    ],
)
def test_raw_gradient_refuses_what_would_read_out_of_bounds(change, message):
    t = torch.zeros(2, 3, 4, 5)
    saved = {"do": t, "o": t, "lse": torch.zeros(2, 3, 4), "bias_grad": False, **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lsmha_fast.attention_backward.cpp(**_raw(), **saved)


def test_raw_packed_operator_refuses_what_is_not_packed():
    for shape in ((2, 4, 2, 3, 5), (2, 4, 3, 5)):
        with pytest.raises(RuntimeError, match=r"qkv must be \(B, N, 3, H, D\)"):
            torch.ops.lsmha_fast.attention_packed.cpp(
                torch.zeros(shape), None, None, None, None, 0.0, 1.0
            )


def seconds(backend, inputs, do):
    start = time.perf_counter()
    o = attention(*inputs, backend=backend)
    if do is not None:
        torch.autograd.grad(o, inputs, do)
    return time.perf_counter() - start


def slowdown(shape, gradient):
    """Median time of the default backend as a share of the best one's, by turns in one process."""
    (q, k, v, do), _ = make_inputs(shape, torch.float32)
    inputs = [t.float().requires_grad_(gradient) for t in (q, k, v)]
    do = do.float() if gradient else None
    chosen = op.default_backend(inputs[0])
    times = {"cpp": [], "sdpa": []}
    for _ in range(9):
        for name, seen in times.items():
            seconds(name, inputs, do)  # the other one has emptied the caches
            seen.append(seconds(name, inputs, do))
    medians = {name: sorted(seen)[len(seen) // 2] for name, seen in times.items()}
    return medians[chosen] / min(medians.values())


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 64, 128, 128, 1), (1, 64, 256, 256, 4), (2, 16, 197, 197, 16), (2, 8, 256, 256, 32),
     (2, 4, 256, 256, 64), (2, 2, 256, 256, 128)],
)  # fmt: skip
def test_default_is_not_slower_than_the_best(shape, gradient):
    """Within 10 %; other work on the machine may spoil a measurement: the best of three counts."""
    assert min(slowdown(shape, gradient) for _ in range(3)) < 1.1
