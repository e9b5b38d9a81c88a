"""The native library: what it links to, what it says when it is missing, its raw operators."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lsmha_fast import _ext

needs_ext = pytest.mark.skipif(_ext.ext_missing() is not None, reason=str(_ext.ext_missing()))


@pytest.fixture
def library():
    import lsmha_fast._C

    return Path(lsmha_fast._C.__file__)


@pytest.fixture
def unloaded(monkeypatch):
    """Forget whether the library loaded, before and after a test."""
    monkeypatch.delitem(sys.modules, "lsmha_fast._C", raising=False)
    _ext._load.cache_clear()
    yield
    _ext._load.cache_clear()


def test_missing_library_is_told_with_the_remedy(unloaded, monkeypatch):
    # None in sys.modules is Python's way to say that a module does not exist
    monkeypatch.setitem(sys.modules, "lsmha_fast._C", None)
    reason = _ext.ext_missing()
    assert "lsmha_fast._C is not built" in reason
    assert "pip install --no-build-isolation ." in reason
    assert _ext.status() == {"lsmha_fast._C": reason}


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


@needs_ext
def test_status_says_loaded():
    assert _ext.status() == {"lsmha_fast._C": "loaded"}


@needs_ext
def test_package_import_does_not_load_the_library():
    code = "import sys, lsmha_fast.ops; sys.exit('lsmha_fast._C' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_ext
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not on PATH")
def test_only_stable_symbols_are_needed(library):
    """One binary for every supported torch and Python: C shims, libc, libstdc++, limited API."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # "U name@VERSION", "w name": versioned ones are from libc, libgcc and libstdc++
    symbols = [line.split()[-1] for line in lines]
    versioned = re.compile(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_")
    weak = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    ours = [s for s in symbols if not versioned.search(s) and s not in weak]
    assert any(s.startswith("aoti_torch_") for s in ours)
    foreign = [s for s in ours if not s.startswith(("aoti_torch_", "torch_"))]
    assert foreign == ["PyModule_Create2"]


@needs_ext
def test_no_path_of_the_build_machine_is_inside(library):
    data = library.read_bytes()
    assert library.name == "_C.abi3.so"
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
    pooled, lse = torch.ops.lsmha_fast_C.seq_pool(x, weight)
    for wrong in (out_grad[:1], out_grad.double(), out_grad.transpose(0, 1)):
        with pytest.raises(RuntimeError, match="must be contiguous float32"):
            torch.ops.lsmha_fast_C.seq_pool_backward(wrong, x, weight, pooled, lse)
    with pytest.raises(RuntimeError, match="must be contiguous float32"):
        torch.ops.lsmha_fast_C.seq_pool_backward(out_grad, x, weight, pooled, lse[:1])


def test_package_import_does_not_load_the_compiler():
    code = "import sys, lsmha_fast.ops; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
