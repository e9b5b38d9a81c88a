"""The native libraries: what they link to, what is said when one is missing, raw operators."""

import importlib
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import lsmha_fast
from lsmha_fast import _ext

needs_ext = pytest.mark.skipif(_ext.ext_missing() is not None, reason=str(_ext.ext_missing()))
needs_cuda_ext = pytest.mark.skipif(
    _ext.cuda_ext_missing() is not None, reason=str(_ext.cuda_ext_missing())
)
LIBRARIES = [
    pytest.param("_C", marks=needs_ext),
    pytest.param("_C_cuda", marks=needs_cuda_ext),
]


@pytest.fixture
def library(name):
    return Path(importlib.import_module(f"lsmha_fast.{name}").__file__)


@pytest.fixture
def unloaded(monkeypatch):
    """Forget whether the libraries loaded, before and after a test."""
    monkeypatch.delitem(sys.modules, "lsmha_fast._C", raising=False)
    monkeypatch.delitem(sys.modules, "lsmha_fast._C_cuda", raising=False)
    _ext._load.cache_clear()
    yield
    _ext._load.cache_clear()


def test_missing_library_is_told_with_the_remedy(unloaded, monkeypatch):
    # None in sys.modules is Python's way to say that a module does not exist
    monkeypatch.setitem(sys.modules, "lsmha_fast._C", None)
    reason = _ext.ext_missing()
    assert "lsmha_fast._C is not built" in reason
    assert "pip install --no-build-isolation ." in reason
    assert _ext.status()["lsmha_fast._C"] == reason


def test_missing_cuda_library_is_told_with_the_remedy(unloaded, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "lsmha_fast._C_cuda", None)
    reason = _ext.status()["lsmha_fast._C_cuda"]
    assert "lsmha_fast._C_cuda is not built" in reason
    assert "pip install --no-build-isolation ." in reason


def test_a_cpu_build_of_torch_does_not_load_the_cuda_library(monkeypatch):
    def load(name):
        raise AssertionError(name)

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(_ext, "_load", load)
    assert _ext.cuda_ext_missing() == f"torch {torch.__version__} is not a CUDA build"


def test_broken_library_is_told_with_its_error(unloaded, monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: torch_made_up")

    monkeypatch.setattr(_ext.importlib, "import_module", broken)
    assert "does not load (undefined symbol: torch_made_up)" in _ext.ext_missing()


def test_missing_library_is_refused_by_name_and_passed_over_by_default(unloaded, monkeypatch):
    from lsmha_fast.ops import head_class_sums

    monkeypatch.setitem(sys.modules, "lsmha_fast._C", None)
    arguments = torch.randn(2, 3, 4, 5), torch.randn(4, 5), torch.tensor([0, 1]), 2
    with pytest.raises(RuntimeError, match=r"'cpp' cannot run this call.*pip install"):
        head_class_sums(*arguments, backend="cpp")
    expected = head_class_sums(*arguments, backend="reference")
    assert torch.equal(head_class_sums(*arguments).sums, expected.sums)


@pytest.mark.parametrize("name", LIBRARIES)
def test_status_says_loaded(name):
    assert _ext.status()[f"lsmha_fast.{name}"] == "loaded"


@pytest.mark.parametrize("name", LIBRARIES)
def test_package_import_does_not_load_the_library(name):
    code = f"import sys, lsmha_fast.ops; sys.exit('lsmha_fast.{name}' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cuda_check_refuses_by_device_dtype_and_library(unloaded, monkeypatch):
    reason = _ext.cuda_check(torch.zeros(1), [torch.float32])
    assert reason == "it needs a CUDA tensor, got one on cpu"
    x = FakeCudaTensor(torch.float64)
    assert "dtype float64 is not one of float32" in _ext.cuda_check(x, [torch.float32])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "lsmha_fast._C_cuda", None)
    assert "lsmha_fast._C_cuda is not built" in _ext.cuda_check(x, [torch.float64])


def test_cuda_check_refuses_a_gpu_that_was_not_built_for(unloaded, monkeypatch):
    library = types.ModuleType("lsmha_fast._C_cuda")
    library.architectures = "8.0;9.0a"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "lsmha_fast._C_cuda", library)
    monkeypatch.setattr(lsmha_fast, "_C_cuda", library, raising=False)
    capabilities = [(9, 0), (10, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert _ext.cuda_check(FakeCudaTensor(torch.float32, 0), [torch.float32]) is None
    reason = _ext.cuda_check(FakeCudaTensor(torch.float32, 1), [torch.float32])
    assert "built for compute capability 8.0;9.0a, the GPU has 10.0" in reason
    assert "TORCH_CUDA_ARCH_LIST=10.0" in reason


class FakeCudaTensor:
    def __init__(self, dtype, index=0):
        self.dtype, self.device = dtype, torch.device("cuda", index)


@pytest.mark.parametrize(
    "architectures, runs, refused",
    [
        ("8.0;9.0a", [(8, 0), (8, 6), (8, 9), (9, 0)], [(7, 5), (10, 0), (12, 0)]),
        ("8.6 9.0a", [(8, 6), (8, 9), (9, 0)], [(8, 0), (7, 5), (10, 0)]),
        ("8.0+PTX", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("9.0a+PTX", [(9, 0)], [(8, 0), (10, 0)]),
        ("Hopper", [(9, 0), (10, 0)], []),
    ],
)
def test_gpus_that_an_architecture_list_serves(architectures, runs, refused):
    assert all(_ext.runs_on(architectures, *gpu) for gpu in runs)
    assert not any(_ext.runs_on(architectures, *gpu) for gpu in refused)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not on PATH")
def test_only_stable_symbols_are_needed(library, name):
    """One binary for every supported torch and Python: C shims, libc, libstdc++, limited API."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # "U name@VERSION", "w name": versioned ones are from libc, libgcc and libstdc++
    symbols = [line.split()[-1] for line in lines]
    versioned = re.compile(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_")
    weak = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    ours = [s for s in symbols if not versioned.search(s) and s not in weak]
    assert any(s.startswith("aoti_torch_") for s in ours)
    foreign = {s for s in ours if not s.startswith(("aoti_torch_", "torch_"))}
    # of the limited API; the CUDA runtime is inside
    python = {"PyModule_Create2"}
    if name == "_C_cuda":
        python |= {"PyModule_AddStringConstant", "_Py_Dealloc"}
    assert foreign == python


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not on PATH")
def test_only_the_entry_is_exported(library, name):
    command = ["nm", "-D", "--defined-only", "--format=just-symbols", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"PyInit_{name}"]


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not on PATH")
def test_no_library_of_one_cuda_release_is_needed(library):
    command = ["objdump", "-p", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED\s+(\S+)", text)
    assert "libc.so.6" in needed
    assert [s for s in needed if re.match(r"libcu|libnv", s)] == []


@pytest.mark.parametrize("name", LIBRARIES)
def test_no_path_of_the_build_machine_is_inside(library, name):
    data = library.read_bytes()
    assert library.name == f"{name}.abi3.so"
    for path in (Path(__file__).parents[1], Path(torch.__file__).parent, Path.home()):
        assert str(path).encode() not in data


@needs_ext
@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4)}, "x must be"),
        ({"x": torch.zeros(2, 3, 5, 4).transpose(2, 3)}, "dense last dimension"),
        ({"x": torch.zeros(2, 3, 4, 5, dtype=torch.float64)}, "float32 or bfloat16"),
        ({"weight": torch.zeros(5, 4)}, "weight must be"),
        ({"weight": torch.zeros(4, 5, dtype=torch.float64)}, "weight must be"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels must be"),
        ({"labels": torch.tensor([0, 2])}, r"label 2 is not in 0\.\.1"),
        ({"labels": torch.tensor([-1, 0])}, r"label -1 is not in 0\.\.1"),
    ],
)
def test_raw_operator_refuses_what_would_read_out_of_bounds(change, message):
    arguments = {
        "x": torch.zeros(2, 3, 4, 5),
        "weight": torch.zeros(4, 5),
        "labels": torch.tensor([0, 1]),
        "num_classes": 2,
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lsmha_fast_C.head_class_sums(**arguments)


@needs_ext
def test_raw_gradient_refuses_what_would_read_out_of_bounds():
    x, weight, out_grad = torch.zeros(2, 3, 4, 5), torch.zeros(4, 5), torch.zeros(2, 4, 5)
    ops = torch.ops.lsmha_fast
    pooled, lse = ops.seq_pool.cpp(x, weight)
    with pytest.raises(RuntimeError, match="must be contiguous float32"):
        ops.seq_pool_backward.cpp(out_grad[:1], x, weight, pooled, lse)
    with pytest.raises(RuntimeError, match="must be contiguous float32"):
        ops.seq_pool_backward.cpp(out_grad, x, weight, pooled, lse[:1])


@needs_cuda_ext
def test_raw_cuda_operators_refuse_what_is_not_on_a_gpu():
    q, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    with pytest.raises(NotImplementedError, match="'lsmha_fast_C_cuda::attention'.*'CPU' backend"):
        torch.ops.lsmha_fast_C_cuda.attention(q, q, q, None, None, None, 0, 1.0, 1.0, q, lse)


def test_package_import_does_not_load_the_compiler():
    code = "import sys, lsmha_fast.ops; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
