"""seq_pool: formula, registration, Triton kernels against fp64."""

import pytest
import torch
from aot import assert_clean, assert_no_worse_than_kept, compile_budgeted

from lsmha_fast._ext import ext_missing
from lsmha_fast.ops import seq_pool
from lsmha_fast.ops.seq_pool import reference
from lsmha_fast.testing import assert_no_worse, nan_filled_empty

needs_cpp = pytest.mark.skipif(ext_missing() is not None, reason=str(ext_missing()))
NATIVE = [pytest.param("cpp", marks=needs_cpp), "triton"]
ALL = ["reference", *NATIVE]

# (B, N, H, D): one of each, odd in all, more tokens than a tile, every head dimension that matters
SHAPES = [
    (1, 1, 1, 1),
    (3, 7, 5, 3),
    (2, 65, 70, 1),
    (2, 70, 256, 1),
    (1, 130, 33, 2),
    (2, 64, 16, 4),
    (1, 67, 9, 8),
    (2, 33, 3, 32),
    (2, 37, 1, 256),
    (1, 9, 2, 17),
    (2, 66, 17, 16),
]


def device_of(backend, device):
    return "cpu" if backend == "cpp" else device


def inputs(shape, dtype, device, scale=1.0):
    B, N, H, D = shape
    x = (torch.randn(B, N, H, D, device=device) * scale).to(dtype)
    weight = (torch.randn(H, D, device=device) * scale * D**-0.5).to(dtype)  # scores of order 1
    return x, weight, torch.randn(B, H, D, device=device).to(dtype)


def run(x, weight, do, backend):
    """Output and gradients through the public function."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = seq_pool(x, weight, backend=backend)
    return out.detach(), *torch.autograd.grad(out, (x, weight), do)


def assert_matches_fp64(x, weight, do, backend):
    low = run(x, weight, do, "reference")
    high = run(x.double(), weight.double(), do.double(), "reference")
    with nan_filled_empty():
        actual = run(x, weight, do, backend)
    for a, lo, hi, factor in zip(actual, low, high, (2.0, 3.0, 3.0), strict=True):
        assert_no_worse(a, lo, hi, factor)


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_reference_is_a_softmax_weighted_mean(shape):
    x, weight, _ = inputs(shape, torch.float64, "cpu")
    expected = torch.empty_like(x[:, 0])
    for h in range(shape[2]):
        p = torch.softmax(x[:, :, h] @ weight[h], dim=1)
        expected[:, h] = torch.einsum("bn,bnd->bd", p, x[:, :, h])
    torch.testing.assert_close(seq_pool(x, weight), expected)


def test_gradient_formula():
    x, weight, _ = inputs((2, 5, 3, 2), torch.float64, "cpu")
    assert torch.autograd.gradcheck(seq_pool, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype):
    x, weight, do = inputs((2, 5, 3, 2), dtype, "cpu")
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    pooled, lse = reference.seq_pool(x, weight)
    torch.library.opcheck(torch.ops.lsmha_fast.seq_pool.default, (transposed, weight, "reference"))
    torch.library.opcheck(
        torch.ops.lsmha_fast.seq_pool_backward.default,
        (do, transposed, weight, pooled, lse, "reference"),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "backend, dtype",
    [
        ("triton", torch.float32),
        ("triton", torch.float16),
        pytest.param("cpp", torch.float32, marks=needs_cpp),
        pytest.param("cpp", torch.bfloat16, marks=needs_cpp),
    ],
)
def test_matches_fp64(shape, backend, dtype, device):
    assert_matches_fp64(*inputs(shape, dtype, device_of(backend, device)), backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("shape", [(2, 70, 4, 4), (2, 70, 16, 4)])
def test_large_scores(shape, backend, device):
    data = inputs(shape, torch.float32, device_of(backend, device), scale=12.0)
    assert_matches_fp64(*data, backend)


VIEWS = {
    "slice of a packed projection": lambda t: t[:, :, 1],
    "heads before tokens": lambda t: t[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2),
    "tokens before images": lambda t: t[:, :, 0].transpose(0, 1).contiguous().transpose(0, 1),
    "channels not dense": lambda t: t[:, :, 2].transpose(2, 3).contiguous().transpose(2, 3),
    "every second token": lambda t: t[:, ::2, 0],
    "one token for all images": lambda t: t[:1, :, 0].expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("backend", NATIVE)
def test_views(view, backend, device):
    device = device_of(backend, device)
    x = VIEWS[view](torch.randn(2, 21, 3, 18, 4, device=device))
    assert not x.is_contiguous()
    do = torch.randn(2, 18, 1, device=device).expand(2, 18, 4)
    assert_matches_fp64(x, torch.randn(4, 18, device=device).T, do, backend)


@pytest.mark.parametrize(
    "backend, dtype",
    [("triton", torch.float16), pytest.param("cpp", torch.bfloat16, marks=needs_cpp)],
)
def test_half_tokens_with_a_float_weight(backend, dtype, device):
    x, weight, do = inputs((2, 20, 6, 4), dtype, device_of(backend, device))
    assert_matches_fp64(x, weight.float(), do, backend)


@pytest.mark.parametrize("backend", ALL)
def test_empty_batch(backend, device):
    x, weight, do = inputs((0, 5, 3, 2), torch.float32, device_of(backend, device))
    out, dx, dweight = run(x, weight, do, backend)
    assert out.shape == (0, 3, 2)
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("backend", ALL)
def test_properties(backend, device):
    device = device_of(backend, device)
    x, weight, _ = inputs((2, 11, 4, 3), torch.float32, device)
    out = seq_pool(x, weight, backend=backend)
    shuffled = x[:, torch.randperm(11, device=device)]
    torch.testing.assert_close(seq_pool(shuffled, weight, backend=backend), out)
    plain_mean = seq_pool(x, torch.zeros_like(weight), backend=backend)
    torch.testing.assert_close(plain_mean, x.mean(1))
    assert torch.equal(seq_pool(x[:, :1], weight, backend=backend), x[:, 0])


@pytest.mark.parametrize("backend", ALL)
def test_not_a_number_stays_in_its_head(backend, device):
    x, weight, _ = inputs((1, 5, 3, 2), torch.float32, device_of(backend, device))
    x[0, 2, 1, 0] = float("nan")
    nan = seq_pool(x, weight, backend=backend).isnan().any(-1)
    assert nan.tolist() == [[False, True, False]]


@pytest.mark.parametrize("backend", ALL)
def test_bitwise_repeatable_and_batch_invariant(backend, device):
    x, weight, do = inputs((4, 70, 5, 4), torch.float32, device_of(backend, device))
    first, second = run(x, weight, do, backend), run(x, weight, do, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if backend != "reference":
        out, dx, _ = run(x[2:3], weight, do[2:3], backend)
        assert torch.equal(out, first[0][2:3])
        assert torch.equal(dx, first[1][2:3])


def test_compiles_as_one_graph(device):
    x, weight, do = inputs((2, 9, 3, 4), torch.float32, device)
    compiled = torch.compile(seq_pool, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = compiled(*leaves)
    eager = run(x, weight, do, None)
    assert torch.equal(out, eager[0])
    for a, b in zip(torch.autograd.grad(out, leaves, do), eager[1:], strict=True):
        assert torch.equal(a, b)


@needs_cpp
def test_native_result_does_not_depend_on_the_number_of_threads():
    data = inputs((40, 64, 16, 4), torch.float32, "cpu")
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(*data, "cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.triton
def test_default_backend_on_a_cpu_is_not_the_interpreter(monkeypatch):
    def fail(*_):
        raise AssertionError("the default ran Triton on a CPU tensor")

    from lsmha_fast.ops.seq_pool import _triton

    monkeypatch.setattr(_triton, "seq_pool", fail)
    seq_pool(torch.randn(1, 2, 3, 4), torch.randn(3, 4))


@pytest.mark.parametrize(
    "x_shape, weight_shape",
    [((2, 3, 4), (3, 4)), ((2, 5, 3, 4), (4, 3)), ((2, 5, 3, 4), (3,)), ((2, 0, 3, 4), (3, 4))],
)
def test_wrong_shapes_are_named(x_shape, weight_shape):
    with pytest.raises(ValueError, match=r"seq_pool: expected x \(B, N >= 1, H, D\)") as error:
        seq_pool(torch.zeros(x_shape), torch.zeros(weight_shape))
    assert str(x_shape) in str(error.value)
    assert str(weight_shape) in str(error.value)


@pytest.mark.triton
def test_backend_is_obeyed_or_refused(device):
    x, weight, _ = inputs((1, 2, 3, 4), torch.float64, device)
    with pytest.raises(
        ValueError, match="unknown backend 'cudnn'; choose from reference, triton, cpp"
    ):
        seq_pool(x, weight, backend="cudnn")
    for backend in ("triton", "cpp"):
        with pytest.raises(RuntimeError, match=rf"'{backend}' cannot run this call.*float64"):
            seq_pool(x.to(device_of(backend, device)), weight, backend=backend)


@pytest.mark.triton
def test_kernels_build_for_sm_90_without_spills():
    configs = compile_budgeted("lsmha_fast.ops.seq_pool._triton")
    assert {c["name"].partition("[")[0] for c in configs} == {"_pool_heads_fwd", "_seq_pool_bwd"}
    for config in configs:
        assert_clean(config)
        assert config["n_regs"] <= 128, config
    assert_no_worse_than_kept(configs)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 256, 64, 4), (64, 256, 256, 1), (64, 256, 1, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_model_shapes_on_gpu(shape, dtype):
    assert_matches_fp64(*inputs(shape, dtype, "cuda"), None)
