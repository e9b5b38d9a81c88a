"""block: formulas, registration, Triton kernels against fp64, builds."""

import pytest
import torch
from aot import assert_clean, assert_no_worse_than_kept, compile_configs
from torch.nn import functional as F

from lsmha_fast.ops import norm_linear, norm_pool_linear, project_mlp
from lsmha_fast.testing import assert_no_worse, nan_filled_empty

pytest.importorskip("triton")
FORMS = pytest.mark.parametrize("normed", [True, False], ids=["published", "pre-norm"])
# (M, C, IN, HIDDEN): one row; fewer, odd, and more than a tile; heads narrower than the row; more
# channels than one piece; hidden units that no tile divides
SHAPES = [
    (1, 16, 16, 16),
    (37, 40, 15, 80),
    (140, 48, 32, 72),
    (33, 192, 48, 100),
    (5, 300, 7, 33),
]
# numbers of rows that the launchers are told instead of the true one, and the rows of a tile of the
# kernel that keeps hidden units to itself; fp32 never takes it, few rows take two others
PLANS = {256: None, 2560: None, 7168: 64, 131072: 128}
CASES = [(256, torch.float32), *((rows, torch.float16) for rows in PLANS)]


@pytest.fixture(params=CASES, ids=lambda case: f"as-{case[0]}-{str(case[1])[6:]}")
def dtype(request, monkeypatch):
    """The dtype of a case, for which tiles are those of another number of rows."""
    from lsmha_fast.ops.block import _triton

    def told(choose):
        return lambda M, *args: choose(rows, *args)

    rows, dtype = request.param
    for name in ("_norm_tile", "_fc1_tile", "_fc2_tile", "_mlp_tile"):
        monkeypatch.setattr(_triton, name, told(getattr(_triton, name)))
    if rows > 7000:  # one program has all outputs and walks over them
        monkeypatch.setattr(_triton, "_shares", lambda *_: 1)
    tile = _triton._mlp_tile(0, 128, dtype)
    assert (tile if tile is None else tile.rows) == PLANS[rows]
    return dtype


def inputs(shape, dtype, device, affine=True):
    """heads, x, and the pairs of project_mlp, at scales that leave sums of order 1."""
    M, C, IN, HIDDEN = shape

    def draw(*size, scale=1.0, shift=0.0):
        return (torch.randn(size, device=device) * scale + shift).to(dtype)

    def linear(out, inner):
        return draw(out, inner, scale=inner**-0.5), draw(out, scale=0.3)

    norm = (draw(C, scale=0.2, shift=1.0), draw(C, scale=0.3)) if affine else (None, None)
    x = draw(M, C, scale=2.0, shift=0.5)
    return draw(M, IN), x, linear(C, IN), norm, linear(HIDDEN, C), linear(C, HIDDEN)


def wide(value):
    if isinstance(value, tuple):
        return tuple(wide(v) for v in value)
    return None if value is None else value.double()


def assert_matches_fp64(function, args, **options):
    low = function(*args, **options, backend="reference")
    high = function(*map(wide, args), **options, backend="reference")
    with nan_filled_empty():
        actual = function(*args, **options, backend="triton")
    assert_no_worse(actual, low, high)


def test_reference_is_the_chain_of_layers():
    heads, x, proj, norm, fc1, fc2 = inputs((6, 8, 4, 12), torch.float64, "cpu")
    d = x - x.mean(1, keepdim=True)
    normal = d / (d.square().mean(1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(norm_linear(x, fc1[0], eps=0.1), normal @ fc1[0].T)
    s = x + heads @ proj[0].T + proj[1]
    n = F.layer_norm(s, (8,), *norm, 0.1)
    pre = n @ fc1[0].T + fc1[1]
    h = pre * torch.special.ndtr(pre)  # the exact GELU, not the one by tanh
    for normed, stream in ((True, n), (False, s)):
        out = project_mlp(heads, x, proj, norm, fc1, fc2, normed_stream=normed, eps=0.1)
        torch.testing.assert_close(out, stream + h @ fc2[0].T + fc2[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_linear_matches_fp64(shape, dtype, device):
    _, x, _, _, fc1, _ = inputs(shape, dtype, device)
    assert_matches_fp64(norm_linear, (x, *fc1))


@FORMS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_mlp_matches_fp64(shape, dtype, normed, device):
    args = inputs(shape, dtype, device, affine=normed)
    assert_matches_fp64(project_mlp, args, normed_stream=normed)


# (B, N, C, K): one token, more tokens and more outputs than a tile, odd channels
@pytest.mark.parametrize("shape", [(1, 1, 16, 1), (2, 70, 257, 40), (3, 65, 40, 11)], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_norm_pool_linear_matches_fp64(shape, kind, device):
    B, N, C, K = shape
    x = (torch.randn(B, N, C, device=device) * 2 + 0.5).to(kind)
    scores = (torch.randn(C, device=device) * 2 * C**-0.5).to(kind)
    weight = (torch.randn(K, C, device=device) * C**-0.5).to(kind)
    bias = torch.randn(K, device=device).to(kind)
    assert_matches_fp64(norm_pool_linear, (x, scores, weight, bias))
    assert_matches_fp64(norm_pool_linear, (x, scores * 30, weight))
    out = norm_pool_linear(x, scores, weight, bias, backend="triton")
    assert torch.equal(norm_pool_linear(x[-1:], scores, weight, bias, backend="triton"), out[-1:])


def test_norm_pool_linear_is_the_norm_the_pool_and_the_layer():
    from lsmha_fast.ops import seq_pool

    x, scores, weight = (torch.randn(s, dtype=torch.float64) for s in ((2, 9, 8), (8,), (5, 8)))
    pooled = seq_pool(F.layer_norm(x, (8,))[:, :, None], scores[None])[:, 0]
    torch.testing.assert_close(norm_pool_linear(x, scores, weight), pooled @ weight.T)


def test_without_biases_and_with_affine_norm_in_either_form(device):
    heads, x, proj, norm, fc1, fc2 = inputs((20, 32, 16, 64), torch.float32, device)
    bare = [(pair[0], None) for pair in (proj, fc1, fc2)]
    assert_matches_fp64(norm_linear, (x, fc1[0]))
    assert_matches_fp64(project_mlp, (heads, x, bare[0], norm, *bare[1:]), normed_stream=False)
    unscaled = heads, x, bare[0], (None, None), *bare[1:]
    assert_matches_fp64(project_mlp, unscaled, normed_stream=True)


def test_gelu_over_its_range(device):
    """A norm that gives its bias, products with the identity, no stream: the result is the GELU."""
    b = torch.linspace(-9, 9, 256, device=device)
    eye, zero = torch.eye(256, device=device), torch.zeros(1, 256, device=device)
    layers = (eye, None), (0 * b, b), (eye, None), (eye, None)
    out = project_mlp(zero, zero, *layers, normed_stream=False, backend="triton")
    assert_no_worse(out[0], F.gelu(b), F.gelu(b.double()), factor=1)


@pytest.mark.parametrize("depth", [16, 256, 512])
def test_products_of_three_tf32_parts_keep_the_error_rule(depth):
    """A model of the kernels' fp32 products, which the interpreter computes in fp32."""

    def parts(t):
        """The number rounded to 11 bits, and the rest likewise."""
        large = ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        rest = t - large
        return large, ((rest.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    a, b = torch.randn(64, depth), torch.randn(depth, 64) * depth**-0.5
    acc = torch.zeros(64, 64)
    for k in range(0, depth, 8):  # the depth of one tf32 instruction
        (a1, a2), (b1, b2) = parts(a[:, k : k + 8].contiguous()), parts(b[k : k + 8])
        acc = ((acc + a2 @ b1) + a1 @ b2) + a1 @ b1
    assert_no_worse(acc, a @ b, a.double() @ b.double())


def test_rows_far_from_zero(device):
    """The variance is that of differences from the mean, not a difference of large squares."""
    heads, x, *pairs = inputs((20, 64, 16, 64), torch.float32, device)
    assert_matches_fp64(norm_linear, (x + 300, *pairs[2]))
    assert_matches_fp64(project_mlp, (heads, x + 300, *pairs), normed_stream=True)


def test_leading_dimensions_and_views(device):
    heads, x, proj, norm, fc1, fc2 = inputs((12, 24, 8, 32), torch.float32, device)
    heads, x = heads.view(3, 4, 8).transpose(0, 1), x.view(4, 3, 24)
    proj = proj[0].T.contiguous().T, proj[1].expand(2, -1)[1]
    options = {"normed_stream": True, "backend": "triton"}
    out = project_mlp(heads, x, proj, norm, fc1, fc2, **options)
    assert out.shape == (4, 3, 24)
    flat = project_mlp(heads.reshape(12, 8), x.view(12, 24), proj, norm, fc1, fc2, **options)
    assert torch.equal(out.view(12, 24), flat)
    assert norm_linear(x[:, ::2], *fc1, backend="triton").shape == (4, 2, 32)


@FORMS
def test_rows_do_not_see_each_other(normed, dtype, device):
    heads, x, *pairs = inputs((140, 32, 16, 48), dtype, device)
    options = {"normed_stream": normed, "backend": "triton"}
    first = project_mlp(heads, x, *pairs, **options)
    assert torch.equal(project_mlp(heads, x, *pairs, **options), first)
    x = x.clone()
    x[40, 3] = float("nan")
    out = project_mlp(heads, x, *pairs, **options)
    assert out.isnan().any(1).nonzero().flatten().tolist() == [40]
    assert torch.equal(out[:40], first[:40])
    qkv = norm_linear(x, *pairs[2], backend="triton")
    assert qkv.isnan().any(1).nonzero().flatten().tolist() == [40]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_rows(backend, device):
    heads, x, *pairs = inputs((0, 16, 8, 32), torch.float32, device)
    assert norm_linear(x, *pairs[2], backend=backend).shape == (0, 32)
    assert project_mlp(heads, x, *pairs, normed_stream=True, backend=backend).shape == (0, 16)
    tokens = x.view(0, 5, 16)
    assert norm_pool_linear(tokens, x.new_zeros(16), *pairs[2], backend=backend).shape == (0, 32)


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_registration(low):
    heads, x, proj, norm, fc1, fc2 = inputs((5, 16, 8, 32), low, "cpu")
    ops = torch.ops.lsmha_fast
    torch.library.opcheck(ops.norm_linear.default, (x, fc1[0], None, 1e-5, "reference"))
    args = (heads, x, *proj, *norm, *fc1, *fc2, True, 1e-5, "reference")
    torch.library.opcheck(ops.project_mlp.default, args)
    head = x[None], norm[0], fc1[0], None, 1e-5, "reference"
    torch.library.opcheck(ops.norm_pool_linear.default, head)


def test_compiles_as_one_graph(device):
    heads, x, *pairs = inputs((6, 16, 8, 32), torch.float32, device)

    def block(heads, x):
        qkv = norm_linear(x, *pairs[2])
        return qkv, project_mlp(heads, x, *pairs, normed_stream=True)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(heads, x), block(heads, x), strict=True):
        assert torch.equal(a, b)


def test_bad_calls_are_one_clear_error(device):
    heads, x, proj, norm, fc1, fc2 = inputs((6, 16, 8, 32), torch.float32, device)
    with pytest.raises(ValueError, match=r"expected weight \(32, 24\), got \(32, 16\)"):
        norm_linear(torch.zeros(3, 24, device=device), *fc1)
    with pytest.raises(ValueError, match=r"expected heads \(6, 8\), got \(5, 8\)"):
        project_mlp(heads[:5], x, proj, norm, fc1, fc2, normed_stream=True)
    with pytest.raises(ValueError, match=r"expected fc2_weight \(16, 32\), got \(32, 16\)"):
        project_mlp(heads, x, proj, norm, fc1, fc1, normed_stream=True)
    with pytest.raises(ValueError, match=r"expected x \(B, N >= 1, C\), got \(6, 16\)"):
        norm_pool_linear(x, norm[0], *fc1)
    with pytest.raises(ValueError, match="weight and bias, or none"):
        project_mlp(heads, x, proj, (norm[0], None), fc1, fc2, normed_stream=True)
    with pytest.raises(ValueError, match=r"computes no gradient; call it under torch.no_grad\(\)"):
        norm_linear(x.requires_grad_(), *fc1)
    with torch.no_grad():
        norm_linear(x, *fc1)
    x = x.detach()
    with pytest.raises(ValueError, match="unknown backend 'cpp'; choose from reference, triton"):
        norm_linear(x, *fc1, backend="cpp")
    with pytest.raises(RuntimeError, match="at most 512 channels, got 520"):
        norm_linear(x.new_zeros(1, 520), x.new_zeros(8, 520), backend="triton")
    with pytest.raises(RuntimeError, match="one dtype, got torch.float32 and torch.float16"):
        norm_linear(x, fc1[0].half(), backend="triton")
    with pytest.raises(RuntimeError, match="float64 is not one of"):
        norm_linear(x.double(), fc1[0].double(), backend="triton")


def test_default_on_a_cpu_is_not_the_interpreter(monkeypatch):
    from lsmha_fast.ops.block import _triton

    monkeypatch.setattr(_triton, "norm_linear", lambda *_: pytest.fail("ran Triton on a CPU"))
    norm_linear(torch.randn(2, 16), torch.randn(8, 16))


def test_kernels_build_for_sm_90_without_spills():
    configs = compile_configs("tests.ops.block_launches", opcodes=True)
    names = {c["name"].partition("[")[0] for c in configs}
    assert names == {"_norm_linear", "_project_fc1", "_fc2", "_project_mlp", "_norm_pool_linear"}
    for config in configs:
        assert_clean(config)
        assert config["shared"] <= 227 << 10, config
        if config["name"].startswith("_project_mlp[bf16") and "BLOCK_M=128" in config["name"]:
            assert_inner_loop_is_short(config)
    assert_no_worse_than_kept(configs)


def assert_inner_loop_is_short(config):
    """128 rows x 32 hidden units: two warps per scheduler, 1390 clocks of the tensor cores."""
    inner = max(config["loops"], key=lambda loop: loop.get("MUFU.EX2", 0))
    slots = 2 * sum(inner.values())
    assert sum(n for op, n in inner.items() if op.startswith("HGMMA")) == 16 + 8
    assert slots <= 900, f"{config['name']}: {slots} instructions"


@pytest.mark.gpu
@FORMS
@pytest.mark.parametrize("batch", [1, 8, 32, 64])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_model_shapes_on_gpu(batch, kind, normed):
    args = inputs((256 * batch, 256, 256, 512), kind, "cuda", affine=normed)
    assert_matches_fp64(norm_linear, (args[1], *args[4]))
    assert_matches_fp64(project_mlp, args, normed_stream=normed)
    tokens = args[1].view(batch, 256, 256)
    assert_matches_fp64(norm_pool_linear, (tokens, args[1][0], *args[4]))
