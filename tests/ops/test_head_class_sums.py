"""head_class_sums: against its definition, in every backend; labels, order, determinism."""

import os
import subprocess
import sys

import pytest
import torch
from aot import assert_clean, assert_no_worse_than_kept, compile_budgeted

from lsmha_fast._ext import ext_missing
from lsmha_fast.ops import HeadClassSums, head_class_sums, seq_pool
from lsmha_fast.testing import assert_no_worse, nan_filled_empty

needs_cpp = pytest.mark.skipif(ext_missing() is not None, reason=str(ext_missing()))
NATIVE = [pytest.param("cpp", marks=needs_cpp), "triton"]
ALL = ["reference", *NATIVE]

# (B, N, H, D): one of each, odd in all, more tokens than a chunk or tile, all paths of the vectors
SHAPES = [
    (1, 1, 1, 1),
    (7, 5, 3, 3),
    (5, 130, 100, 1),
    (4, 65, 33, 2),
    (6, 64, 64, 4),
    (5, 70, 19, 8),
    (3, 9, 17, 16),
    (3, 33, 3, 32),
    (4, 21, 1, 256),
    (2, 6, 2, 37),
    (3, 3, 5, 4),
]


def inputs(shape, dtype=torch.float32, device="cpu", num_classes=4, scale=1.0):
    B, N, H, D = shape
    x = (torch.randn(B, N, H, D, device=device) * scale).to(dtype)
    weight = (torch.randn(H, D, device=device) * scale * D**-0.5).to(dtype)  # scores of order 1
    return x, weight, torch.randint(num_classes, (B,), device=device)


def device_of(backend, device):
    return "cpu" if backend == "cpp" else device


def assert_matches_fp64(x, weight, labels, num_classes, backend):
    low = head_class_sums(x, weight, labels, num_classes, backend="reference")
    high = head_class_sums(x.double(), weight.double(), labels, num_classes, backend="reference")
    with nan_filled_empty():
        actual = head_class_sums(x, weight, labels, num_classes, backend=backend)
    assert isinstance(actual, HeadClassSums)
    assert actual.sums.dtype == torch.float32
    assert_no_worse(actual.sums, low.sums, high.sums)
    assert torch.equal(actual.counts, torch.bincount(labels, minlength=num_classes))


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_reference_is_pool_then_add(shape):
    x, weight, labels = inputs(shape, torch.float64)
    sums, counts = head_class_sums(x, weight, labels, 4, backend="reference")
    expected = torch.zeros(4, *weight.shape, dtype=torch.float64)
    for pooled, label in zip(seq_pool(x, weight), labels, strict=True):
        expected[label] += pooled
    torch.testing.assert_close(sums, expected)
    assert counts.sum() == shape[0]


def test_registration():
    x, weight, labels = inputs((5, 4, 3, 2))
    op = torch.ops.lsmha_fast.head_class_sums.default
    torch.library.opcheck(op, (x, weight, labels, 4, "reference"))
    if ext_missing() is None:
        torch.library.opcheck(op, (x.bfloat16(), weight, labels, 4, "cpp"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", NATIVE)
def test_matches_fp64(shape, backend, device):
    assert_matches_fp64(*inputs(shape, device=device_of(backend, device)), 4, backend)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "backend, dtype",
    [pytest.param("cpp", torch.bfloat16, marks=needs_cpp), ("triton", torch.float16)],
)
def test_half_precision_matches_fp64(shape, backend, dtype, device):
    assert_matches_fp64(*inputs(shape, dtype, device_of(backend, device)), 4, backend)


@pytest.mark.parametrize("backend", NATIVE)
def test_large_scores(backend, device):
    data = inputs((4, 70, 16, 4), device=device_of(backend, device), scale=12.0)
    assert_matches_fp64(*data, 4, backend)


VIEWS = {
    "slice of a packed projection": lambda t: t[:, :, 1],
    "heads before tokens": lambda t: t[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2),
    "tokens before images": lambda t: t[:, :, 0].transpose(0, 1).contiguous().transpose(0, 1),
    "channels not dense": lambda t: t[:, :, 2].transpose(2, 3).contiguous().transpose(2, 3),
    "every second head": lambda t: t[:, :, 0, ::2],
    "half of the heads": lambda t: t[:, :, 0, 3:],
    "one image for all": lambda t: t[:1, :, 0].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("backend", NATIVE)
def test_views(view, backend, device):
    device = device_of(backend, device)
    x = VIEWS[view](torch.randn(3, 21, 3, 36, 4, device=device))
    assert not x.is_contiguous()
    weight = torch.randn(4, x.shape[2], device=device).T
    labels = torch.tensor([9, 2, 9, 0, 1], device=device)[::2]
    assert_matches_fp64(x, weight, labels, 10, backend)


@pytest.mark.parametrize("backend", ALL)
def test_classes_without_images_have_zeros(backend, device):
    x, weight, _ = inputs((3, 4, 2, 5), device=device_of(backend, device))
    labels = torch.tensor([6, 1, 6], device=x.device)
    sums, counts = head_class_sums(x, weight, labels, 9, backend=backend)
    assert counts.tolist() == [0, 1, 0, 0, 0, 0, 2, 0, 0]
    assert torch.equal(sums[counts == 0], torch.zeros(7, 2, 5, device=x.device))
    assert (sums[[1, 6]] != 0).all()


@pytest.mark.parametrize("backend", ALL)
def test_empty_batch(backend, device):
    x, weight, labels = inputs((0, 5, 3, 2), device=device_of(backend, device))
    sums, counts = head_class_sums(x, weight, labels, 4, backend=backend)
    assert torch.equal(sums, torch.zeros(4, 3, 2, device=x.device))
    assert torch.equal(counts, torch.zeros(4, dtype=torch.int64, device=x.device))


@needs_cpp
def test_batch_longer_than_the_native_workspace():
    assert_matches_fp64(*inputs((2050, 2, 3, 4), num_classes=7), 7, "cpp")


@needs_cpp
def test_native_sums_run_in_batch_order():
    x, weight, labels = inputs((50, 3, 5, 4))
    sums, _ = head_class_sums(x, weight, labels, 4, backend="cpp")
    expected = torch.zeros_like(sums)
    for image, label in zip(x, labels, strict=True):
        expected[label] += head_class_sums(image[None], weight, label[None], 4).sums[label]
    assert torch.equal(sums, expected)


@needs_cpp
@pytest.mark.parametrize("shape", [(300, 16, 64, 4), (300, 16, 3, 32)])
def test_native_result_does_not_depend_on_the_number_of_threads(shape):
    data = inputs(shape)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(head_class_sums(*data, 4, backend="cpp").sums)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results[1:])


@needs_cpp
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_instruction_sets(capability, tmp_path):
    data = inputs((5, 70, 37, 4))
    torch.save(data, tmp_path / "data.pt")
    code = (
        "import sys, torch; from lsmha_fast.ops import head_class_sums;"
        "x, w, y = torch.load(sys.argv[1]);"
        "torch.save([head_class_sums(x.to(t), w, y, 4, backend='cpp').sums"
        " for t in (torch.float32, torch.bfloat16)], sys.argv[2])"
    )
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    paths = [str(tmp_path / "data.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", code, *paths], env=env, check=True)
    for actual, dtype in zip(torch.load(paths[1]), (torch.float32, torch.bfloat16), strict=True):
        x, weight, labels = data[0].to(dtype), *data[1:]
        low = head_class_sums(x, weight, labels, 4, backend="reference").sums
        high = head_class_sums(x.double(), weight.double(), labels, 4, backend="reference").sums
        assert_no_worse(actual, low, high)


@pytest.mark.parametrize("backend", NATIVE)
def test_bitwise_repeatable(backend, device):
    data = inputs((9, 70, 20, 4), device=device_of(backend, device))
    first, second = (head_class_sums(*data, 4, backend=backend).sums for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ALL)
def test_not_a_number_stays_in_its_class_and_head(backend, device):
    x, weight, _ = inputs((3, 70, 20, 4), device=device_of(backend, device))
    x[1, 5, 17, 0] = float("nan")
    labels = torch.tensor([0, 1, 2], device=x.device)
    nan = head_class_sums(x, weight, labels, 3, backend=backend).sums.isnan().any(-1)
    assert nan.nonzero().tolist() == [[1, 17]]


@pytest.mark.parametrize("backend", ALL)
def test_result_is_detached(backend, device):
    x, weight, labels = inputs((3, 4, 2, 5), device=device_of(backend, device))
    sums, _ = head_class_sums(x.requires_grad_(), weight.requires_grad_(), labels, 4)
    assert not sums.requires_grad


def test_compiles_as_one_graph(device):
    x, weight, labels = inputs((5, 9, 3, 4), device=device)
    compiled = torch.compile(head_class_sums, fullgraph=True, backend="aot_eager")
    eager = head_class_sums(x, weight, labels, 4)
    for a, b in zip(compiled(x, weight, labels, 4), eager, strict=True):
        assert torch.equal(a, b)


def test_field_matrix_is_linear_in_the_sums():
    x, weight, labels = inputs((12, 6, 3, 4), torch.float64)
    classifier = torch.randn(4, 3, 4, dtype=torch.float64)
    sums, counts = head_class_sums(x, weight, labels, 4)
    fields = torch.einsum("bhd,khd->bhk", seq_pool(x, weight), classifier)
    for c in range(4):
        means = sums[c] / counts[c]
        expected = fields[labels == c].mean(0)
        torch.testing.assert_close(torch.einsum("hd,khd->hk", means, classifier), expected)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("bad", [-1, 4, 1000])
def test_bad_label_is_named(backend, bad):
    x, weight, labels = inputs((3, 4, 2, 5))
    labels[1] = bad
    with pytest.raises(ValueError, match=rf"labels must be in 0\.\.3, got {bad}"):
        head_class_sums(x, weight, labels, 4, backend=backend)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 4, 2)}, r"x \(3, 4, 2\)"),
        ({"x": torch.zeros(3, 0, 2, 5)}, r"N >= 1"),
        ({"weight": torch.zeros(5, 2)}, r"weight \(5, 2\)"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"shape \(3,\), got int64 \(4,\)"),
        ({"labels": torch.zeros(3)}, "expected int64 labels.*got float32"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"backend": "cuda"}, "unknown backend 'cuda'; choose from reference, triton, cpp"),
    ],
)
def test_bad_input_is_named(change, message):
    x, weight, labels = inputs((3, 4, 2, 5))
    arguments = {"x": x, "weight": weight, "labels": labels, "num_classes": 4, **change}
    with pytest.raises(ValueError, match=message):
        head_class_sums(**arguments)


@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_backend_refuses_what_it_cannot_run(backend, device):
    x, weight, labels = inputs((3, 4, 2, 5), torch.float64)
    with pytest.raises(RuntimeError, match=rf"'{backend}' cannot run this call.*float64"):
        head_class_sums(x, weight, labels, 4, backend=backend)


@needs_cpp
def test_default_backend_on_a_cpu_is_native(monkeypatch):
    from lsmha_fast.ops.head_class_sums import _cpp

    called = []
    native = _cpp.head_class_sums
    monkeypatch.setattr(_cpp, "head_class_sums", lambda *a: called.append(1) or native(*a))
    head_class_sums(*inputs((3, 4, 2, 5)), 4)
    assert called


@pytest.mark.triton
def test_kernels_build_for_sm_90_without_spills():
    configs = compile_budgeted("lsmha_fast.ops.head_class_sums._triton")
    assert {c["name"].partition("[")[0] for c in configs} == {"_pool_heads_fwd", "_class_sums"}
    for config in configs:
        assert_clean(config)
    assert_no_worse_than_kept(configs)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(500, 256, 64, 4), (500, 256, 256, 1), (500, 256, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_model_shapes_on_gpu(shape, dtype):
    assert_matches_fp64(*inputs(shape, dtype, "cuda", num_classes=100), 100, None)
