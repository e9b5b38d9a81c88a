"""Attention without Triton: formulas, registration, library kernels, compile, errors."""

import pytest
import torch
from attention_cases import assert_backend_is_exact, make_inputs, packed, run
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from lsmha_fast._ext import ext_missing
from lsmha_fast.ops import attention, attention_packed, attention_weights
from lsmha_fast.ops._triton_utils import triton_missing
from lsmha_fast.ops.attention import reference
from lsmha_fast.ops.attention.op import CHECKS
from lsmha_fast.testing import assert_no_worse, nan_filled_empty

SHAPE = (2, 3, 4, 5, 2)  # B, H, L, S, D
# dimensions that broadcast, that miss, and a shift of whole rows, whose gradient is zero
BIASES = [(3, 4, 5), (2, 1, 1, 5), (1, 3, 4, 1), (4, 5), (1,), (2, 3, 4, 5)]
OPS = torch.ops.lsmha_fast


def doubles(tensors):
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize(
    "bias, dropout_p", [*((bias, 0.0) for bias in BIASES), (BIASES[0], 0.4), (BIASES[1], 0.4)]
)
def test_gradient_formula(bias, dropout_p):
    tensors, options = make_inputs(SHAPE, torch.float64, masked=True, bias=bias, head_scale=True)

    def call(q, k, v, bias, head_scale):
        torch.manual_seed(0)
        mask = options["key_mask"]
        return attention(
            q, k, v, key_mask=mask, bias=bias, head_scale=head_scale, dropout_p=dropout_p,
            scale=0.7, backend="reference",
        )  # fmt: skip

    inputs = doubles([*tensors[:3], options["bias"], options["head_scale"]])
    assert gradcheck(call, inputs)


def test_gradient_formula_packed():
    tensors, options = make_inputs((2, 3, 4, 4, 2), torch.float64, head_scale=True)
    qkv, head_scale = doubles([packed(tensors)[0], options["head_scale"]])

    def call(qkv, head_scale):
        return attention_packed(qkv, head_scale=head_scale, backend="reference")

    assert gradcheck(call, (qkv, head_scale))


@pytest.mark.parametrize("bias", BIASES)
def test_gradient_formula_weights(bias):
    tensors, options = make_inputs(SHAPE, torch.float64, masked=True, bias=bias)
    mask = options["key_mask"]
    inputs = doubles([*tensors[:2], options["bias"]])
    assert gradcheck(lambda q, k, bias: attention_weights(q, k, key_mask=mask, bias=bias), inputs)


def test_bias_may_hold_minus_infinity():
    tensors, options = make_inputs(SHAPE, torch.float64, bias=(3, 4, 5))
    options["bias"][:, 1] = -torch.inf  # one query without keys
    options["bias"][:, 2, 3:] = -torch.inf
    for backend in ("reference", "sdpa"):
        o, dq, dk, dv = run_without_bias_gradient(backend, tensors, options)
        q, k, v, do = doubles(tensors)
        assert (o[:, :, 1] == 0).all()
        assert (dq[:, :, 1] == 0).all()
        rows = [0, 2, 3]
        logits = q[:, :, rows] @ k.mT * 2**-0.5 + options["bias"][:, rows]
        expected = torch.softmax(logits, -1) @ v
        torch.testing.assert_close(o[:, :, rows], expected.detach())
        expected = torch.autograd.grad(expected, (q, k, v), do[:, :, rows])
        torch.testing.assert_close((dq, dk, dv), expected)


def run_without_bias_gradient(backend, tensors, options):
    q, k, v, do = doubles(tensors)
    o = attention(q, k, v, backend=backend, **options)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 17, 17, 4), (2, 2, 65, 130, 1), (1, 2, 1, 3, 13)])
def test_sdpa_matches_reference(shape, dtype, masked):
    tensors, options = make_inputs(shape, dtype, masked=masked, head_scale=True)
    with nan_filled_empty():
        actual = run("sdpa", dtype, tensors, options)
    plain = eager(dtype, tensors, options)
    high = run("reference", torch.float64, tensors, options)
    for i, (a, l, h) in enumerate(zip(actual, plain, high, strict=True)):
        assert_no_worse(a, l, h, factor=2 if i == 0 else 3)


def eager(dtype, tensors, options):
    """What one writes by hand, every step in `dtype`; the library's kernels are held to this."""
    q, k, v, do = (t.to(dtype).requires_grad_() for t in tensors)
    head_scale = options["head_scale"].to(dtype).requires_grad_()
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if "key_mask" in options:
        scores = scores.masked_fill(~options["key_mask"][:, None, None], -torch.inf)
    p = torch.softmax(scores, -1)
    p = torch.where(p.isnan(), 0, p)
    o = p @ v * head_scale[:, None, None]
    grads = torch.autograd.grad(o, (q, k, v, head_scale), do)
    return o.detach(), *(torch.where(g.isnan(), 0, g) for g in grads)


def test_sdpa_matches_reference_packed():
    tensors, options = make_inputs((2, 3, 17, 17, 4), torch.float32, masked=True, head_scale=True)
    assert_backend_is_exact("sdpa", torch.float32, packed(tensors), options, attention_packed)


def operator_cases():
    (q, k, v, do), options = make_inputs(SHAPE, torch.float32, masked=True, bias=(1, 3, 4, 5),
                                         head_scale=True)  # fmt: skip
    q, k, v, do, bias, head_scale = (
        t.float() for t in (q, k, v, do, options["bias"], options["head_scale"])
    )
    mask, seed = options["key_mask"], torch.tensor([5])
    (qkv, dout) = packed([k, k, v, v])
    o, lse = reference.attention(op_inputs(q, k, v))
    packed_o, packed_lse = OPS.attention_packed(qkv, None, None, None, None, 0.0, 1.0, "reference")
    all_options = (mask, bias, head_scale, seed, 0.2, 0.5)
    none = (None, None, None, None, 0.0, 0.5)
    weights, weights_lse = OPS.attention_weights(q, k, mask, bias, seed, 0.2, 0.5, "reference")
    for backend in ("reference",) if triton_missing() else ("reference", "triton"):
        yield "attention", (q, k, v, *all_options, backend)
        yield "attention_backward", (do, q, k, v, *all_options, o, lse, True, backend)
        yield "attention_packed", (qkv, None, bias[..., :1, :], *all_options[2:], backend)
        yield (
            "attention_packed_backward",
            (dout, qkv, None, None, *all_options[2:], packed_o, packed_lse, False, backend),
        )
    yield "attention", (q, k, v, *none, "sdpa")
    yield "attention_backward", (do, q, k, v, *none, o, lse, False, "sdpa")
    yield "attention", (q[:0], k[:0], v[:0], *none, "reference")
    backends = ("reference",) if ext_missing() else ("reference", "cpp")
    for backend in backends:
        yield "attention_weights", (q, k, mask, bias, seed, 0.2, 0.5, backend)
        yield (
            "attention_weights_backward",
            (weights, q, k, mask, bias, seed, 0.2, 0.5, weights_lse, True, backend),
        )
        yield "attention_with_weights", (q, k, v, *all_options, backend)


def op_inputs(q, k, v):
    return reference.Inputs(q, k, v, None, None, None, None, 0.0, 0.5)


def test_operators_are_registered_right():
    for name, arguments in operator_cases():
        checks = ["test_schema", "test_faketensor"]
        if arguments[-1] != "triton":  # the graph is the same, and the interpreter slow
            checks.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_memory_of_output_and_gradients(backend):
    (q, k, v, do), _ = make_inputs((2, 3, 5, 5, 4), torch.float32)
    (qkv, dout) = (t.float() for t in packed((q, k, v, do)))
    qkv = qkv.requires_grad_()
    o = attention_packed(qkv, backend=backend)
    assert o.is_contiguous()
    (dqkv,) = torch.autograd.grad(o, qkv, dout)
    assert dqkv.shape == qkv.shape
    assert dqkv.is_contiguous()
    o = attention(q.float(), k.float(), v.float(), backend=backend)
    assert o.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize("shape", [(0, 2, 3, 3, 4), (2, 2, 0, 3, 4), (2, 2, 3, 0, 4)])
def test_empty_dimensions_give_zeros(backend, shape):
    tensors, options = make_inputs(shape, torch.float32, head_scale=True, bias=(1, 2, 1, 1))
    if backend == "sdpa":
        options.pop("bias")
    with nan_filled_empty():
        o, *grads = run(backend, torch.float32, tensors, options)
    assert o.shape == (*shape[:3], shape[4])
    assert all((t == 0).all() for t in (o, *grads))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_compiles_whole(backend, dropout_p):
    if backend == "sdpa" and dropout_p:
        pytest.skip("sdpa has no dropout")

    def loss(q, k, v, qkv, head_scale):
        options = {"head_scale": head_scale, "dropout_p": dropout_p, "backend": backend}
        o, weights = attention(q, k, v, **options), attention_weights(q, k)
        return o.square().sum() + attention_packed(qkv, **options).square().sum() + weights[0].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (2, 3):
        (q, k, v, do), options = make_inputs((B, 3, 4, 4, 2), torch.float32, head_scale=True)
        inputs = [q, k, v, packed((q, k, v, do))[0], options["head_scale"]]
        results = []
        for call in (loss, compiled):
            leaves = [t.float().requires_grad_() for t in inputs]
            torch.manual_seed(0)
            value = call(*leaves)
            results.append((value, *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("bias", [None, (1, 3, 1, 5)])
def test_weights_are_the_head_average(bias):
    (q, k, _, dw), options = make_inputs((2, 3, 4, 5, 5), torch.float64, masked=True, bias=bias)
    mask, bias = options["key_mask"], options.get("bias")
    weights = attention_weights(q, k, key_mask=mask, bias=bias)
    logits = q @ k.mT * 5**-0.5 + (0 if bias is None else bias)
    full = torch.softmax(logits.masked_fill(~mask[:, None, None], -torch.inf), -1).nan_to_num(0)
    torch.testing.assert_close(weights, full.mean(1))
    assert (weights[-1] == 0).all()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest result of any operation inside the block."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return result


def test_weights_never_hold_all_heads():
    B, H, L, S, D = 2, 16, 24, 20, 1
    q, k = torch.randn(B, H, L, D), torch.randn(B, H, S, D)
    a = op_inputs(q, k, k)
    with LargestTensor() as largest:
        weights, lse = reference.attention_weights(a)
        buffers = torch.empty_like(q), torch.empty_like(k)
        reference.attention_weights_backward(weights, a, lse, False, *buffers)
    assert largest.numel == reference.HEADS_AT_ONCE * B * L * S
    assert reference.HEADS_AT_ONCE < H


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_autocast_changes_nothing(backend):
    tensors, options = make_inputs(SHAPE, torch.float32, head_scale=True)
    plain = run(backend, torch.float32, tensors, options)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(backend, torch.float32, tensors, options)
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [b for b in CHECKS if b not in ("triton", "cuda")])
@pytest.mark.parametrize("D", [1, 2, 16])
def test_last_dimension_need_not_be_dense(backend, D):
    """As in models that keep images (B, C, rows, columns): transposed tokens."""
    tensors = [torch.randn(2, 3, D, 49).double().mT for _ in range(4)]
    q = tensors[0].float()
    if CHECKS[backend](q, None, None, 0.0) is not None:
        pytest.skip("the backend does not run here")
    assert q.stride(-1) == 49
    assert_backend_is_exact(backend, torch.float32, tensors, {})
