"""residual_norm: formula, registration, native and Triton kernels against fp64."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from aot import assert_clean, assert_no_worse_than_kept, compile_configs
from torch.nn import functional as F

from lsmha_fast._ext import ext_missing
from lsmha_fast.ops import residual_norm
from lsmha_fast.ops.residual_norm import reference
from lsmha_fast.testing import assert_no_worse, nan_filled_empty

needs_cpp = pytest.mark.skipif(ext_missing() is not None, reason=str(ext_missing()))
NATIVE = [pytest.param("cpp", marks=needs_cpp), "triton"]
ALL = ["reference", *NATIVE]
NAMES = ("x", "branch", "weight", "bias")

# one of each, odd in all, the published width, more rows than a chunk, wider than a tile
SHAPES = [(1, 1, 1), (3, 7, 5), (2, 3, 256), (3, 47, 33), (2, 2, 3, 130), (1, 2, 2100)]
# what is left out of the call
FORMS = {
    "all": (),
    "no factor": ("keep",),
    "no branch": ("branch", "keep"),
    "no parameters": ("weight", "bias"),
    "no bias": ("bias", "keep"),
    "no weight": ("weight",),
}
TYPES = [
    pytest.param("triton", torch.float32, id="triton-fp32"),
    pytest.param("triton", torch.float16, id="triton-fp16"),
    pytest.param("cpp", torch.float32, id="cpp-fp32", marks=needs_cpp),
    pytest.param("cpp", torch.bfloat16, id="cpp-bf16", marks=needs_cpp),
]


def device_of(backend, device):
    return "cpu" if backend == "cpp" else device


def inputs(shape, dtype, device, without=(), branch_dtype=None, offset=0.5):
    """Tensors of a call by name, those that are left out as None; sample 1 is dropped."""
    C = shape[-1]
    made = {
        "x": (torch.randn(shape, device=device) + offset).to(dtype),
        "branch": torch.randn(shape, device=device).to(branch_dtype or dtype),
        "weight": torch.randn(C, device=device).add(1.0).to(dtype),
        "bias": torch.randn(C, device=device).to(dtype),
        "keep": torch.full(shape[:1], 1 / 0.9, device=device),
    }
    made["keep"][1:2] = 0.0
    return {name: None if name in without else t for name, t in made.items()}


def plain(x, branch=None, weight=None, bias=None, *, keep=None, post_norm=False, dtype=None, **_):
    """What one writes without the op; half precision as autocast does it."""
    s = x
    if branch is not None:
        factor = 1 if keep is None else keep.to(branch.dtype).view(-1, *[1] * (x.ndim - 1))
        s = x + branch * factor
    weight, bias = (None if t is None else t.to(s.dtype) for t in (weight, bias))
    y = F.layer_norm(s, s.shape[-1:], weight, bias)
    return (y if post_norm else s), y.to(dtype or s.dtype)


def run(call, tensors, grads, **options):
    """Stream, y and the gradients of everything that was given, by name."""
    leaves = {
        k: t.detach().requires_grad_() for k, t in tensors.items() if k in NAMES and t is not None
    }
    outs = call(**{**tensors, **leaves}, **options)
    used = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None]
    found = torch.autograd.grad(
        [o for o, _ in used],
        list(leaves.values()),
        [g.to(o.dtype) for o, g in used],
        materialize_grads=True,
    )
    return {
        "stream": outs[0].detach(),
        "y": outs[1].detach(),
        **dict(zip(leaves, found, strict=True)),
    }


def double(tensors):
    return {k: None if t is None else t.double() for k, t in tensors.items()}


def assert_matches_fp64(tensors, backend, grads=None, **options):
    x = tensors["x"]
    if grads is None:
        grads = [torch.randn(x.shape, device=x.device).to(x.dtype) for _ in range(2)]
    low = run(plain, tensors, grads, **options)
    exact = {**options, "dtype": torch.float64}
    high = run(plain, double(tensors), [None if g is None else g.double() for g in grads], **exact)
    with nan_filled_empty():
        actual = run(residual_norm, tensors, grads, backend=backend, **options)
    assert actual.keys() == low.keys()
    for name, value in actual.items():
        assert_no_worse(value, low[name], high[name], 2.0 if name in ("stream", "y") else 3.0)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_reference_is_the_definition(form, post_norm):
    tensors = inputs((3, 7, 5), torch.float64, "cpu", FORMS[form])
    grads = [torch.randn(3, 7, 5, dtype=torch.float64) for _ in range(2)]
    expected = run(plain, tensors, grads, post_norm=post_norm)
    for backend in ("reference", None):
        actual = run(residual_norm, tensors, grads, post_norm=post_norm, backend=backend)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_formula(form, post_norm):
    tensors = inputs((3, 2, 5), torch.float64, "cpu", FORMS[form])
    leaves = {k: t.requires_grad_() for k, t in tensors.items() if k in NAMES and t is not None}

    def call(*args):
        named = {**tensors, **dict(zip(leaves, args, strict=True))}
        return residual_norm(**named, post_norm=post_norm, backend="reference")

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("form", ["all", "no branch"])
def test_registration(form, post_norm, dtype):
    x, branch, weight, bias, keep = inputs((3, 4, 5), torch.float32, "cpu", FORMS[form]).values()
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    call = (x, branch, keep, weight, bias, 1e-5, post_norm, dtype)
    torch.library.opcheck(torch.ops.lsmha_fast.residual_norm.default, (*call, "reference"))
    _, y, mean, rstd = reference.residual_norm(*call)
    branch_dtype = None if branch is None else dtype
    for parameters in (True, False):
        call = (y, x, x, branch, keep, weight, mean, rstd, post_norm, x.dtype, branch_dtype)
        torch.library.opcheck(
            torch.ops.lsmha_fast.residual_norm_backward.default, (*call, parameters, "reference")
        )


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend, dtype", TYPES)
def test_matches_fp64(backend, dtype, shape, post_norm, device):
    tensors = inputs(shape, dtype, device_of(backend, device))
    assert_matches_fp64(tensors, backend, post_norm=post_norm)


@needs_cpp
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_lesser_instruction_sets(capability):
    chosen = "(matches_fp64 or left_out or mixed) and cpp"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([*command, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend, dtype", TYPES)
def test_what_may_be_left_out(backend, dtype, form, post_norm, device):
    tensors = inputs((3, 5, 40), dtype, device_of(backend, device), FORMS[form])
    assert_matches_fp64(tensors, backend, post_norm=post_norm)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("unused", [0, 1])
@pytest.mark.parametrize("backend", NATIVE)
def test_one_result_is_not_used(backend, unused, post_norm, device):
    device = device_of(backend, device)
    grads = [None if i == unused else torch.randn(3, 5, 40, device=device) for i in range(2)]
    tensors = inputs((3, 5, 40), torch.float32, device)
    assert_matches_fp64(tensors, backend, grads, post_norm=post_norm)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("types", ["stream", "tokens", "branch"])
@pytest.mark.parametrize("backend", NATIVE)
def test_mixed_types(backend, types, post_norm, device):
    """Of x, branch and y, those of autocast first; the parameters are fp32."""
    half = torch.float16 if backend == "triton" else torch.bfloat16
    x_dtype, branch_dtype, dtype = {
        "stream": (torch.float32, half, half),
        "tokens": (half, half, torch.float32),
        "branch": (half, torch.float32, None),
    }[types]
    tensors = inputs((3, 5, 40), x_dtype, device_of(backend, device), branch_dtype=branch_dtype)
    tensors |= {k: tensors[k].float() for k in ("weight", "bias")}
    assert_matches_fp64(tensors, backend, post_norm=post_norm, dtype=dtype)


@pytest.mark.parametrize("backend", NATIVE)
def test_a_common_offset_does_not_cancel(backend, device):
    tensors = inputs((3, 5, 256), torch.float32, device_of(backend, device), offset=300.0)
    assert_matches_fp64(tensors, backend)


VIEWS = {
    "tokens before images": lambda t: t.transpose(0, 1),
    "channels not dense": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every second channel": lambda t: torch.cat([t, t], -1)[..., ::2],
    "one image for all": lambda t: t[:1].expand(len(t), -1, -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("backend", NATIVE)
def test_views(view, backend, device):
    device = device_of(backend, device)
    tensors = inputs((4, 6, 10), torch.float32, device)
    tensors["x"] = VIEWS[view](tensors["x"])
    tensors["branch"] = torch.randn(tensors["x"].shape[::-1], device=device).permute(2, 1, 0)
    tensors["keep"] = torch.rand(2 * len(tensors["x"]), device=device)[::2]
    tensors["weight"] = torch.randn(10, 3, device=device)[:, 1]
    assert not tensors["x"].is_contiguous()
    grads = [torch.randn(()).expand(tensors["x"].shape), VIEWS[view](torch.randn(4, 6, 10))]
    assert_matches_fp64(tensors, backend, [g.to(device) for g in grads])


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)])
@pytest.mark.parametrize("backend", ALL)
def test_empty(backend, shape, device):
    tensors = inputs(shape, torch.float32, device_of(backend, device))
    found = run(residual_norm, tensors, [tensors["x"]] * 2, backend=backend)
    assert found["stream"].shape == found["y"].shape == found["branch"].shape == shape
    assert torch.equal(found["weight"], torch.zeros_like(tensors["weight"]))
    assert torch.equal(found["bias"], torch.zeros_like(tensors["bias"]))


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("backend", ALL)
def test_dropped_sample_passes_unchanged(backend, post_norm, device):
    tensors = inputs((3, 5, 40), torch.float32, device_of(backend, device))
    grads = [torch.randn(3, 5, 40, device=tensors["x"].device) for _ in range(2)]
    found = run(residual_norm, tensors, grads, backend=backend, post_norm=post_norm)
    assert torch.equal(found["branch"][1], torch.zeros_like(found["branch"][1]))
    without = {k: None if k in ("branch", "keep") else t for k, t in tensors.items()}
    alone = run(residual_norm, without, grads, backend=backend, post_norm=post_norm)
    for name in ("stream", "y", "x"):
        assert torch.equal(found[name][1], alone[name][1])


@pytest.mark.parametrize("backend", ALL)
def test_the_stream_shares_memory_where_it_is_another_tensor(backend, device):
    tensors = inputs((3, 5, 40), torch.float32, device_of(backend, device), ("branch", "keep"))
    x = tensors["x"]
    stream, y = residual_norm(**tensors, backend=backend)
    assert stream.data_ptr() == x.data_ptr() != y.data_ptr()
    stream, y = residual_norm(**tensors, backend=backend, post_norm=True)
    assert stream.data_ptr() == y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("backend", ALL)
def test_not_a_number_stays_in_its_row(backend, device):
    tensors = inputs((2, 3, 40), torch.float32, device_of(backend, device))
    tensors["x"][0, 2, 1] = float("nan")
    _, y = residual_norm(**tensors, backend=backend)
    assert y.isnan().any(-1).tolist() == [[False, False, True], [False] * 3]
    assert y[0, 2].isnan().all()


@pytest.mark.parametrize("backend", ALL)
def test_bitwise_repeatable_and_batch_invariant(backend, device):
    tensors = inputs((4, 70, 40), torch.float32, device_of(backend, device))
    grads = [torch.randn(4, 70, 40, device=tensors["x"].device) for _ in range(2)]
    first, second = (run(residual_norm, tensors, grads, backend=backend) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    if backend != "reference":
        part = {k: t[2:3] if k in ("x", "branch", "keep") else t for k, t in tensors.items()}
        found = run(residual_norm, part, [g[2:3] for g in grads], backend=backend)
        for name in ("stream", "y", "x", "branch"):
            assert torch.equal(found[name], first[name][2:3])


@needs_cpp
def test_native_result_does_not_depend_on_the_number_of_threads():
    tensors = inputs((40, 64, 40), torch.float32, "cpu")
    grads = [torch.randn(40, 64, 40) for _ in range(2)]
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(residual_norm, tensors, grads, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)


@pytest.mark.parametrize("backend", [None, "reference", *NATIVE])
@pytest.mark.parametrize("form", ["all", "no branch"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_compiles_as_one_graph(post_norm, form, backend, device):
    tensors = inputs((3, 9, 8), torch.float32, device_of(backend, device), FORMS[form])
    grads = [torch.randn(3, 9, 8, device=tensors["x"].device) for _ in range(2)]
    options = {"post_norm": post_norm, "backend": backend}
    torch.compiler.reset()
    compiled = torch.compile(residual_norm, fullgraph=True, backend="aot_eager")
    expected = run(residual_norm, tensors, grads, **options)
    torch.testing.assert_close(run(compiled, tensors, grads, **options), expected)


@pytest.mark.parametrize("post_norm", [False, True])
def test_vmap_and_gradients_per_sample(post_norm):
    tensors = inputs((3, 4, 6), torch.float64, "cpu")
    weight, bias = tensors["weight"], tensors["bias"]

    def loss(weight, x, branch, keep):
        stream, y = residual_norm(x, branch, weight, bias, keep=keep, post_norm=post_norm)
        return (stream * y.square()).sum()

    samples = [tensors[k][:, None] for k in ("x", "branch", "keep")]
    actual = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(weight, *samples)
    for i, one in enumerate(zip(*samples, strict=True)):
        leaf = weight.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, *one), leaf)
        torch.testing.assert_close(actual[i], expected)


def test_exports_in_standard_operators():
    class Call(torch.nn.Module):
        def forward(self, x, branch):
            return residual_norm(x, branch, post_norm=True)[1]

    x = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    program = torch.export.export(Call(), x)
    assert "lsmha_fast" not in str(program.graph)
    torch.testing.assert_close(program.module()(*x), Call()(*x))


@needs_cpp
@pytest.mark.parametrize(
    "rows, branch_dtype, dtype, kernel",
    [
        (255, torch.bfloat16, torch.bfloat16, False),
        (256, torch.bfloat16, torch.bfloat16, True),
        (256, torch.bfloat16, torch.float32, True),
        (256, torch.float32, torch.bfloat16, True),
        (256, torch.float32, torch.float32, False),
    ],
)
def test_default_on_a_cpu(rows, branch_dtype, dtype, kernel, monkeypatch):
    from lsmha_fast.ops.residual_norm import _cpp

    calls = []
    actual = _cpp.residual_norm
    monkeypatch.setattr(_cpp, "residual_norm", lambda *a: calls.append(a) or actual(*a))
    tensors = inputs((2, rows, 256), torch.float32, "cpu", branch_dtype=branch_dtype)
    found = residual_norm(**tensors, dtype=dtype)
    assert len(calls) == kernel
    expected = residual_norm(**tensors, dtype=dtype, backend="reference")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"x": (4,)},
        {"x": (2, 0)},
        {"branch": (2, 3)},
        {"weight": (3,)},
        {"bias": (4, 1)},
        {"keep": (2, 1)},
    ],
)
def test_wrong_shapes_are_named(change):
    shapes = {"x": (2, 3, 4), **change}
    with pytest.raises(ValueError, match=r"expected float x \(B, ..., C >= 1\)") as error:
        residual_norm(**{name: torch.zeros(shape) for name, shape in shapes.items()})
    for name, shape in shapes.items():
        assert f"{name} {shape}" in str(error.value)


def test_what_is_refused(device):
    x = torch.randn(2, 3, 4, device=device)
    with pytest.raises(ValueError, match="expected float x"):
        residual_norm(x.long())
    with pytest.raises(ValueError, match="keep gets no gradient"):
        residual_norm(x, x, keep=torch.ones(2, device=device, requires_grad=True))
    with pytest.raises(
        ValueError, match="unknown backend 'cudnn'; choose from reference, triton, cpp"
    ):
        residual_norm(x, backend="cudnn")
    for backend, (a, b, c) in itertools.product(
        ("triton", "cpp"), (([1, 0, 0]), [0, 1, 0], [0, 0, 1])
    ):
        wide = [x.double() if d else x for d in (a, b)]
        wide = [t.to(device_of(backend, device)) for t in wide]
        dtype = torch.float64 if c else torch.float32
        with pytest.raises(RuntimeError, match=rf"'{backend}' cannot run this call.*float64"):
            residual_norm(*wide, dtype=dtype, backend=backend)
    with pytest.raises(RuntimeError, match="at most 4096 channels, got 4097"):
        residual_norm(torch.zeros(1, 4097, device=device), backend="triton")


@needs_cpp
def test_raw_operator_refuses_what_it_would_read_or_write_wrongly():
    raw = torch.ops.lsmha_fast_C.residual_norm
    x, row, channels = torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(4)
    good = dict(x=x, branch=x, keep=torch.zeros(2), weight=channels, bias=channels, eps=1e-5)
    good |= dict(post_norm=False, stream=x.clone(), y=x.clone(), mean=row, rstd=row.clone())
    raw(**good)
    for name, wrong, words in [
        ("branch", x[:1], "branch must be contiguous"),
        ("branch", x.view(2, 4, 3), "branch must be contiguous"),
        ("y", x.double(), "y must be contiguous"),
        ("x", x.mT, "must be contiguous"),
        ("keep", torch.zeros(3), "keep must be contiguous float32 of 2"),
        ("weight", channels.double(), "weight must be contiguous float32 of 4"),
        ("mean", channels, "mean must be contiguous float32 of 6"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            raw(**{**good, name: wrong})


def test_kernels_build_for_sm_90_without_spills():
    configs = compile_configs("lsmha_fast.ops.residual_norm._triton")
    names = {c["name"].partition("[")[0] for c in configs}
    assert names == {"_residual_norm_fwd", "_residual_norm_bwd"}
    for config in configs:
        assert_clean(config)
        # 48 or 16 and more warps on a multiprocessor
        assert config["n_regs"] <= (40 if "fwd" in config["name"] else 104), config
    assert_no_worse_than_kept(configs)


@pytest.mark.gpu
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_model_shapes_on_gpu(dtype, post_norm):
    tensors = inputs((64, 256, 256), dtype, "cuda")
    assert_matches_fp64(tensors, None, post_norm=post_norm)
    mixed = inputs((64, 256, 256), torch.float32, "cuda", branch_dtype=torch.bfloat16)
    assert_matches_fp64(mixed, None, post_norm=post_norm, dtype=torch.bfloat16)
