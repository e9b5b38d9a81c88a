"""Small calls stay cheap: the package's functions are counted, whatever else the machine does."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lsmha_fast
from lsmha_fast._ext import ext_missing
from lsmha_fast.ops import attention, attention_packed, conv_stem, seq_pool
from lsmha_fast.ops._dispatch import native_missing
from lsmha_fast.testing import nan_filled_empty

PACKAGE = str(Path(lsmha_fast.__file__).parent)
OPS = torch.ops.lsmha_fast
native = pytest.mark.skipif(ext_missing() is not None, reason=str(ext_missing()))

q, qkv, image = torch.zeros(1, 4, 8, 4), torch.zeros(1, 8, 3, 4, 4), torch.zeros(1, 3, 4, 4)
weight, filters = torch.zeros(8, 4), torch.zeros(16, 3, 3, 3)
# a call, what it is differentiated by, and how many functions its forward and backward may take
CALLS = {
    "attention": (lambda q: attention(q, q, q), q, 16, 3),
    "attention_packed": (attention_packed, qkv, 15, 3),
    "seq_pool": (lambda x: seq_pool(x, weight), q, 7, 2),
    "conv_stem": (lambda w: conv_stem(image, w, stride=1, padding=1), filters, 10, 17),
}


def functions_of(call):
    """Names of the package's functions that a call runs, in order."""
    seen = []

    def look(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            seen.append(frame.f_code.co_name)

    call()  # what happens once is not counted
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


@native
@pytest.mark.parametrize("name", CALLS)
def test_a_differentiable_call_takes_few_functions(name):
    call, x, forward_bound, backward_bound = CALLS[name]
    x = x.clone().requires_grad_()
    out = call(x)
    forward = functions_of(lambda: call(x))
    assert 0 < len(forward) <= forward_bound, forward
    do = torch.zeros_like(out)
    backward = functions_of(lambda: torch.autograd.grad(out, x, do, retain_graph=True))
    assert 0 < len(backward) <= backward_bound, backward


# key_mask, bias, head_scale, seed, dropout_p, scale
OPTIONS = None, None, None, None, 0.0, 1.0
lse = torch.zeros(1, 4, 8)
NATIVE = {
    "attention": (q, q, q, *OPTIONS),
    "attention_backward": (q, q, q, q, *OPTIONS, q, lse, False),
    "attention_packed": (qkv, *OPTIONS),
    "attention_packed_backward": (qkv[:, :, 0], qkv, *OPTIONS, qkv[:, :, 0], lse, False),
    "attention_weights": (q, q, None, None, None, 0.0, 1.0),
    "attention_weights_backward": (
        *(torch.zeros(1, 8, 8), q, q),
        *(None, None, None, 0.0, 1.0, lse, False),
    ),
    "attention_with_weights": (q, q, q, *OPTIONS),
    "seq_pool": (q, weight),
    "seq_pool_backward": (weight[None], q, weight, weight[None], torch.zeros(1, 8)),
    "conv_stem": (image, filters, None, 1, 1, [3, 2, 1], True),
}


def test_every_native_overload_is_in_the_list():
    names = torch._C._dispatch_get_all_op_names()
    ops = {n.removesuffix(".cpp") for n in names if n.startswith("lsmha_fast::") and ".cpp" in n}
    assert ops == {f"lsmha_fast::{name}" for name in NATIVE}


@native
@pytest.mark.parametrize("name", NATIVE)
def test_opcheck(name):
    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(getattr(OPS, name).cpp, NATIVE[name], test_utils=checks)


@native
@pytest.mark.parametrize("name", NATIVE)
def test_no_python_stands_between_dispatcher_and_kernel(name):
    op = getattr(OPS, name)
    assert functions_of(lambda: op.cpp(*NATIVE[name])) == []
    for actual, expected in zip(
        op.default(*NATIVE[name], "cpp"), op.cpp(*NATIVE[name]), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("overload", ["default", "cpp"])
def test_an_op_loads_its_library_or_says_why_not(overload):
    """As an exported program calls it, which knows nothing of the public functions."""
    last = ", 'cpp'" if overload == "default" else ""
    call = (
        f"torch.ops.lsmha_fast.seq_pool.{overload}(torch.ones(1, 2, 3, 4), torch.ones(3, 4){last})"
    )
    if ext_missing() is None:
        code = f"import torch, lsmha_fast.ops; assert {call}[0].eq(1).all()"
        subprocess.run([sys.executable, "-c", code], check=True)
    block = "import sys; sys.modules['lsmha_fast._C'] = None; import torch, lsmha_fast.ops; "
    done = subprocess.run([sys.executable, "-c", block + call], capture_output=True, text=True)
    assert done.returncode == 1
    last_line = done.stderr.splitlines()[-1]
    assert "BackendError: lsmha_fast::seq_pool: backend 'cpp' cannot run this call" in last_line
    assert "lsmha_fast._C" in last_line


@native
def test_a_library_that_lacks_an_op_is_named():
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    assert native_missing("lsmha_fast::seq_pool", cpu) is None
    assert (
        native_missing("lsmha_fast::seq_pool", cuda) == "it needs a CPU tensor, got one on cuda:0"
    )
    library = torch.library.Library("lsmha_fast_tests", "DEF")
    library.define("later.cpp(Tensor x) -> Tensor")
    reason = native_missing("lsmha_fast_tests::later", cpu)
    assert reason.startswith("the native extension lsmha_fast._C is of an older version; pip ")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_memory_of_native_results_is_filled_where_tests_ask_for_it():
    with nan_filled_empty():
        x = torch.ops.aten.empty.memory_format([1000], dtype=torch.float32)
    assert (x == x[0]).all()
    assert x[0] > 3e38
