"""Averaged weights by the native CPU kernels, alone and with the output, against the reference."""

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import SEED, make_inputs

from lsmha_fast import _ext
from lsmha_fast.ops import attention, attention_weights, attention_with_weights
from lsmha_fast.testing import assert_no_worse, nan_filled_empty

native = pytest.mark.skipif(_ext.ext_missing() is not None, reason=str(_ext.ext_missing()))
DTYPES = [torch.float32, torch.bfloat16]
GRADS = ("o", "weights", "dq", "dk", "dv", "dbias", "dhead_scale")


def run(backend, dtype, tensors, options, dweights):
    """Output, averaged weights and the gradients of both together."""
    *inputs, do = (t.to(dtype) for t in tensors)
    inputs = [t.detach().requires_grad_() for t in inputs]
    options = dict(options)
    for name in ("bias", "head_scale"):
        if name in options:
            options[name] = options[name].to(dtype).requires_grad_()
            inputs.append(options[name])
    torch.manual_seed(SEED)
    out, weights = attention_with_weights(*inputs[:3], backend=backend, **options)
    grads = torch.autograd.grad((out, weights), inputs, (do, dweights.to(dtype)))
    return out.detach(), weights.detach(), *grads


def cases_of(shape, dtype, grow=1.0, **options):
    B, _, L, S, _ = shape
    tensors, options = make_inputs(shape, dtype, **options)
    tensors = [(t * grow).to(dtype).double() for t in tensors[:2]] + tensors[2:]
    # as large as the gradient of the output, which it is added to
    return tensors, options, torch.randn(B, L, S).to(dtype).double() * shape[1]


def assert_exact(actual, dtype, case):
    low, high = (run("reference", t, *case) for t in (dtype, torch.float64))
    for name, a, l, h in zip(GRADS, actual, low, high, strict=False):
        assert_no_worse(a, l, h, factor=2 if name in ("o", "weights") else 3)


def check(*args, **options):
    case = cases_of(*args, **options)
    with nan_filled_empty():
        actual = run("cpp", args[1], *case)
    assert_exact(actual, args[1], case)


@native
@pytest.mark.parametrize("D", [1, 2, 3, 4, 7, 8, 16, 33, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims(D, dtype):
    check((2, 3, 35, 35, D), dtype, masked=D % 2 == 0)


@native
@pytest.mark.parametrize(
    "L, S", [(1, 2), (15, 16), (17, 63), (64, 65), (129, 33), (257, 255), (3, 1030)]
)
@pytest.mark.parametrize("D", [2, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(L, S, D, dtype):
    check((2, 2, L, S, D), dtype)


@native
@pytest.mark.parametrize("bias", [(6, 65, 70), (2, 1, 1, 70), (65, 70), (2, 6, 65, 70)])
@pytest.mark.parametrize("D", [3, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options_together(dtype, D, bias):
    check((2, 6, 65, 70, D), dtype, masked=True, bias=bias, head_scale=True, dropout_p=0.2)


@native
@pytest.mark.parametrize("D", [1, 8, 32])
@pytest.mark.parametrize("options", [{}, {"masked": True, "dropout_p": 0.2}])
def test_large_logits(D, options):
    check((2, 2, 40, 150, D), torch.float32, grow=12.0, **options)


@native
def test_bias_may_hold_minus_infinity():
    case = cases_of((2, 3, 20, 33, 4), torch.float32, bias=(3, 20, 33))
    case[1]["bias"][:, 1] = -torch.inf  # one query without keys
    case[1]["bias"][:, 2, 3:] = -torch.inf
    with nan_filled_empty():
        actual = run("cpp", torch.float32, *case)
    weights, dq = actual[1], actual[2]
    assert (weights[:, 1] == 0).all()
    assert (weights[:, 2, 3:] == 0).all()
    assert (dq[:, :, 1] == 0).all()
    assert_exact(actual, torch.float32, case)


@native
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_alone_they_have_the_bits_they_have_with_the_output(dropout_p):
    (q, k, v, _), options = make_inputs((2, 5, 70, 66, 4), torch.float32, masked=True)
    q, k, v = (t.float() for t in (q, k, v))
    options["dropout_p"] = dropout_p
    results = []
    for call in (lambda: attention_weights(q, k, **options),
                 lambda: attention_with_weights(q, k, v, **options).weights):  # fmt: skip
        torch.manual_seed(SEED)
        results.append(call())
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", ["reference", "sdpa", None])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_output_is_what_these_weights_give(backend, dropout_p):
    """One head, so that its weights are the average: out = weights v, dropped ones included."""
    if backend == "sdpa" and dropout_p:
        pytest.skip("sdpa has no dropout")
    q, k, v = torch.randn(3, 4, 1, 33, 8).double()
    out, weights = attention_with_weights(q, k, v, dropout_p=dropout_p, backend=backend)
    torch.testing.assert_close(out, weights[:, None] @ v)
    assert ((weights == 0).double().mean() - dropout_p).abs() < 0.05


@pytest.mark.parametrize("bias", [(3, 4, 5), (1, 1, 4, 5)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradient_formula(bias, dropout_p):
    tensors, options = make_inputs((2, 3, 4, 5, 2), torch.float64, masked=True, bias=bias)
    mask = options["key_mask"]
    inputs = [t.clone().requires_grad_() for t in (*tensors[:3], options["bias"])]

    def call(q, k, v, bias):
        torch.manual_seed(0)
        return attention_with_weights(
            q, k, v, key_mask=mask, bias=bias, dropout_p=dropout_p, backend="reference"
        )

    assert torch.autograd.gradcheck(call, inputs)


@native
@pytest.mark.parametrize("what", ["o", "weights"])
def test_either_gradient_alone(what):
    (q, k, v, do), _ = make_inputs((2, 3, 20, 20, 4), torch.float32)
    grads = []
    for backend in ("cpp", "reference"):
        inputs = [t.float().requires_grad_() for t in (q, k, v)]
        out, weights = attention_with_weights(*inputs, backend=backend)
        loss = (out * do).sum() if what == "o" else weights.square().sum()
        grads.append(torch.autograd.grad(loss, inputs, allow_unused=True))
    assert (grads[0][2] is None) == (what == "weights")
    for a, e in zip(*grads, strict=True):
        assert a is e is None or torch.allclose(a, e, rtol=1e-4, atol=1e-6)


@native
def test_one_key_has_weight_one_and_no_gradient():
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 3, 1, 5).unbind())
    weights = attention_with_weights(q, k, v).weights
    torch.testing.assert_close(weights, torch.ones(2, 1, 1))
    dq, dk = torch.autograd.grad(weights.square().sum(), (q, k))
    assert (dq == 0).all()
    assert (dk == 0).all()


@native
def test_strided_views_are_read_in_place():
    qkv = torch.randn(2, 50, 3, 6, 5)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    expected = attention_with_weights(q.contiguous(), k.contiguous(), v.contiguous())
    for actual, e in zip(attention_with_weights(q, k, v), expected, strict=True):
        assert torch.equal(actual, e)
    one = attention_with_weights(q.mT.contiguous().mT, k[:1].expand(2, -1, -1, -1), v)
    torch.testing.assert_close(one.weights[:1], expected.weights[:1])


@native
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("D", [4, 16])
def test_bits_depend_neither_on_threads_nor_on_the_batch(D, dropout_p):
    case = cases_of((5, 6, 150, 70, D), torch.float32, masked=True, dropout_p=dropout_p)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run("cpp", torch.float32, *case))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)
    if dropout_p == 0:  # dropout's bits are counted from the first image
        tensors, options, dweights = case
        one = slice(3, 4)
        options = {"key_mask": options["key_mask"][one]}
        alone = run("cpp", torch.float32, [t[one] for t in tensors], options, dweights[one])
        for a, e in zip(alone, results[0], strict=True):
            assert torch.equal(a, e[one])


@native
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_lesser_instruction_sets(capability, tmp_path):
    cases = [
        cases_of((2, 3, 37, 66, D), torch.float32, masked=True, bias=bias, dropout_p=p)
        for D in (2, 20)
        for bias, p in ((None, 0.0), ((3, 37, 66), 0.2))
    ]
    paths = [str(tmp_path / "cases.pt"), str(tmp_path / "out.pt"), os.path.dirname(__file__)]
    torch.save(cases, paths[0])
    code = (
        "import sys, torch\nsys.path.insert(0, sys.argv[3])\n"
        "from test_attention_weights import run\n"
        "torch.save([run('cpp', torch.float32, *c) for c in torch.load(sys.argv[1])], sys.argv[2])"
    )
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", code, *paths], env=env, check=True)
    for actual, case in zip(torch.load(paths[1]), cases, strict=True):
        assert_exact(actual, torch.float32, case)


@native
def test_nan_stays_in_its_row_and_an_empty_average_is_zero():
    q, k, v = torch.randn(3, 2, 3, 40, 4)
    q[0, 1, 7] = float("nan")
    out, weights = attention_with_weights(q, k, v)
    rows = weights.isnan().all(-1)
    assert rows.nonzero().tolist() == [[0, 7]]
    assert weights.isnan().sum() == 40
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 1, 7]]
    out, weights = attention_with_weights(q, k[:, :, :0], v[:, :, :0])
    assert (out == 0).all()
    assert weights.shape == (2, 40, 0)


OPTIONS = {"key_mask": None, "bias": None, "seed": None, "dropout_p": 0.0, "scale": 1.0}


@native
@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.empty(2, 3, 4, 2).double()}, "float32 or bfloat16"),
        ({"v": torch.empty(2, 3, 4, 2)}, "v must be"),
        ({"k": torch.empty(2, 3, 5, 3)}, "k must be"),
    ],
)
def test_raw_operator_refuses_what_would_read_out_of_bounds(change, message):
    t = {"q": torch.empty(2, 3, 4, 2), "k": torch.empty(2, 3, 5, 2), "v": torch.empty(2, 3, 5, 2)}
    t |= change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lsmha_fast.attention_with_weights.cpp(**t, **OPTIONS, head_scale=None)


@native
def test_raw_gradient_refuses_what_would_read_out_of_bounds():
    q, lse = torch.empty(2, 3, 4, 2), torch.empty(2, 3, 4)
    for wrong in (torch.empty(2, 4, 5), torch.empty(2, 4, 4).double()):
        with pytest.raises(RuntimeError, match="dweights has the wrong shape"):
            torch.ops.lsmha_fast.attention_weights_backward.cpp(
                dweights=wrong, q=q, k=q, **OPTIONS, lse=lse, bias_grad=False
            )


@native
def test_memory_is_that_of_the_results():
    """Never (B, H, L, S): 64 heads of 512 tokens would take 64 MB a sample."""
    import resource

    q, k, v = torch.randn(3, 2, 64, 512, 2)
    attention(q, k, v)
    attention_with_weights(q[:, :2], k[:, :2], v[:, :2])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attention_with_weights(q, k, v)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 32 * 1024, f"{grown} KB"
