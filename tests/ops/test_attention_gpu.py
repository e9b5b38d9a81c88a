"""Attention on a real device: bf16, every length, repeatability, CUDA graphs, library kernels."""

import functools

import pytest
import torch
from attention_cases import assert_backend_is_exact, make_inputs, packed, run

from lsmha_fast._ext import cuda_ext_missing
from lsmha_fast.ops import attention, attention_packed
from lsmha_fast.ops.attention import op, reference
from lsmha_fast.testing import assert_no_worse

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CUDA_LACKS = cuda_ext_missing()
BACKENDS = [
    "triton",
    pytest.param("cuda", marks=pytest.mark.skipif(CUDA_LACKS is not None, reason=str(CUDA_LACKS))),
]
backends = pytest.mark.parametrize("backend", BACKENDS)


def skip_what_cuda_refuses(backend, D, bias=None):
    if backend == "cuda" and (D > op.CUDA_MAX_HEAD_DIM or bias is not None):
        pytest.skip("the CUDA kernels take heads of up to 16 channels and no bias")


def check(shape, dtype, backend="triton", function=attention, **options):
    tensors, options = make_inputs(shape, dtype, device="cuda", **options)
    if function is attention_packed:
        tensors = packed(tensors)
    assert_backend_is_exact(backend, dtype, tensors, options, function)


@backends
@pytest.mark.parametrize("D", [1, 2, 3, 4, 5, 8, 13, 16, 32, 64])
@pytest.mark.parametrize("N", [1, 17, 64, 196, 256, 512, 1024])
def test_bf16_sizes(N, D, backend):
    skip_what_cuda_refuses(backend, D)
    if N == 1:  # gradients of q and k are zero, which no error rule can measure
        tensors, options = make_inputs((2, 3, 1, 1, D), torch.bfloat16, device="cuda")
        o, _, _, dv = run(backend, torch.bfloat16, tensors, options)
        assert torch.equal(o, tensors[2].bfloat16())
        assert torch.equal(dv, tensors[3].bfloat16())
    else:
        check((2, 3, N, N, D), torch.bfloat16, backend)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [None, (3, 200, 300), (2, 1, 1, 300)])
@pytest.mark.parametrize("D", [1, 4, 8, 16, 64])
def test_every_option(D, bias, dtype, backend):
    skip_what_cuda_refuses(backend, D, bias)
    options = {"masked": True, "head_scale": True, "dropout_p": 0.1, "bias": bias}
    check((2, 3, 200, 300, D), dtype, backend, **options)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D, dropout_p", [(4, 0.0), (4, 0.1), (3, 0.0)])
def test_packed(D, dropout_p, dtype, backend):
    check((4, 64, 256, 256, D), dtype, backend, attention_packed, dropout_p=dropout_p)


@pytest.mark.skipif(CUDA_LACKS is not None, reason=str(CUDA_LACKS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [4, 16])
def test_logits_that_need_exact_maxima(D, dtype):
    tensors, options = make_inputs((2, 3, 100, 300, D), dtype, device="cuda", masked=True)
    q, k, v = (t * factor for t, factor in zip(tensors, (8, 8, 1), strict=False))
    call = functools.partial(attention, **options)
    low = [t.to(dtype) for t in (q, k, v)]
    actual = call(*low, backend="cuda")
    assert_no_worse(actual, call(*low, backend="reference"), call(q, k, v, backend="reference"))


@pytest.mark.skipif(CUDA_LACKS is not None, reason=str(CUDA_LACKS))
@pytest.mark.parametrize("D", [4, 16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_more_keys_than_fit_shared_memory(D, dropout_p):
    options = {"masked": True, "dropout_p": dropout_p}
    check((2, 2, 130, 5000, D), torch.bfloat16, "cuda", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [8, 32, 64])
def test_sdpa(D, dtype):
    check((2, 4, 196, 256, D), dtype, backend="sdpa", head_scale=True)


@backends
def test_same_bits_every_time(backend):
    options = {"masked": True, "head_scale": True, "dropout_p": 0.1}
    options["bias"] = (8, 256, 256) if backend == "triton" else None
    tensors, options = make_inputs((8, 8, 256, 256, 4), torch.bfloat16, device="cuda", **options)
    first = run(backend, torch.bfloat16, tensors, options)
    for _ in range(100):
        for a, b in zip(first, run(backend, torch.bfloat16, tensors, options), strict=True):
            assert torch.equal(a, b)


@backends
@pytest.mark.parametrize("N", [64, 256, 600])
def test_result_does_not_depend_on_the_batch(N, backend):
    tensors, options = make_inputs((64, 8, N, N, 4), torch.bfloat16, device="cuda")
    whole = run(backend, torch.bfloat16, tensors, options)
    alone = run(backend, torch.bfloat16, [t[5:6] for t in tensors], options)
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a[5:6], b)


def test_dropout_bits_equal_the_reference():
    B, H, N, D = 2, 3, 64, 64
    zero = torch.zeros(B, H, N, D, device="cuda", dtype=torch.bfloat16)
    eye = torch.eye(N, device="cuda", dtype=torch.bfloat16).expand(B, H, N, D)
    v = eye.clone().requires_grad_()
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device="cuda")
    torch.manual_seed(3)
    o = attention(zero, zero, v, dropout_p=0.3, backend="triton")
    expected = reference.keep_mask(seed, (B, H, N, N), 0.3)
    assert torch.equal(o > 0, expected)
    assert torch.equal(torch.autograd.grad(o, v, eye)[0].mT > 0, expected)


@pytest.mark.skipif(CUDA_LACKS is not None, reason=str(CUDA_LACKS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [4, 8, 16])
def test_cuda_kernels_drop_what_the_reference_drops(D, dtype):
    """Logits of zero and values that are 1 at D of the keys: outputs say which of them are kept."""
    B, H, N = 2, 3, 200
    zero = torch.zeros(B, H, N, D, device="cuda", dtype=dtype)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device="cuda")
    expected = reference.keep_mask(seed, (B, H, N, N), 0.3)
    for first in range(0, N - D, 7 * D):
        v = torch.zeros_like(zero)
        v[:, :, first : first + D] = torch.eye(D, device="cuda", dtype=dtype)
        torch.manual_seed(3)
        o = attention(zero, zero, v, dropout_p=0.3, backend="cuda")
        assert torch.equal(o > 0, expected[..., first : first + D])


@backends
def test_cuda_graph_draws_anew_at_every_replay(backend):
    q = torch.randn(2, 8, 64, 4, device="cuda", dtype=torch.bfloat16)
    attention(q, q, q, dropout_p=0.5, backend=backend)  # compile outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = attention(q, q, q, dropout_p=0.5, backend=backend)
    graph.replay()
    first = o.clone()
    graph.replay()
    assert not torch.equal(first, o)


@pytest.mark.parametrize(
    "D, options, expected",
    [
        (4, {}, "triton" if CUDA_LACKS else "cuda"),
        (16, {"dropout_p": 0.1}, "triton" if CUDA_LACKS else "cuda"),
        (17, {}, "triton"),
        (32, {}, "sdpa"),
        (32, {"dropout_p": 0.1}, "triton"),
        (128, {"dropout_p": 0.1}, "reference"),
    ],
)
def test_default_backend(D, options, expected):
    q = torch.zeros(1, 2, 8, D, device="cuda", dtype=torch.bfloat16)
    args = (q, None, None, options.get("dropout_p", 0.0))
    assert op.default_backend(*args) == expected
