"""Registration with PyTorch's flash registry: opt-in, exact, undone without a trace."""

import subprocess
import sys

import pytest
import torch
from torch.nn import attention as registry
from torch.nn.functional import scaled_dot_product_attention

from lsmha_fast import register_flash_attention
from lsmha_fast._ext import ext_missing
from lsmha_fast.nn import flash
from lsmha_fast.testing import assert_no_worse

needs_registry = pytest.mark.skipif(
    not hasattr(registry, "register_flash_attention_impl"), reason="this torch has no registry"
)
native = pytest.mark.skipif(ext_missing() is not None, reason=str(ext_missing()))


@pytest.fixture
def _active():
    registry.activate_flash_attention_impl(register_flash_attention())
    yield
    registry.restore_flash_attention_impl(_raise_warn=False)


def inputs(*shape, dtype=torch.float32, other=None):
    torch.manual_seed(0)
    return [torch.randn(s, dtype=dtype) for s in (shape, other or shape, other or shape, shape)]


def run(tensors, dtype=None, **options):
    *leaves, do = (t.to(dtype or t.dtype) for t in tensors)
    leaves = [t.detach().requires_grad_() for t in leaves]
    o = scaled_dot_product_attention(*leaves, **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


class Counted:
    """The namespace of our operators, which counts how often one is taken from it."""

    def __init__(self):
        self.ops, self.calls = flash.OPS, 0

    def __getattr__(self, name):
        self.calls += 1
        return getattr(self.ops, name)


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(flash, "OPS", Counted())
    return flash.OPS


@needs_registry
def test_importing_and_registering_activate_nothing():
    code = (
        "import torch.nn.attention as a, lsmha_fast\n"
        "assert 'LSMHA' not in a.list_flash_attention_impls()\n"
        "assert lsmha_fast.register_flash_attention() == 'LSMHA'\n"
        "assert 'LSMHA' in a.list_flash_attention_impls()\n"
        "assert a.current_flash_attention_impl() is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@native
@needs_registry
@pytest.mark.usefixtures("_active")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_of_every_model_runs_our_kernels(dtype, masked, counted):
    tensors = inputs(2, 3, 33, 4, dtype=dtype, other=(2, 3, 20, 4))
    options = {"attn_mask": torch.randn(33, 20).to(dtype)} if masked else {}
    actual = run(tensors, scale=0.3, **options)
    assert counted.calls == 2  # forward and backward
    options = {k: v.double() for k, v in options.items()}
    with registry.sdpa_kernel(registry.SDPBackend.MATH):
        high = run(tensors, torch.double, scale=0.3, **options)
        options = {k: v.to(dtype) for k, v in options.items()}
        low = run(tensors, scale=0.3, **options)
    for i, group in enumerate(zip(actual, low, high, strict=True)):
        assert_no_worse(*group, factor=2 if i == 0 else 3)


@native
@needs_registry
@pytest.mark.usefixtures("_active")
@pytest.mark.parametrize(
    "options, shape, dtype",
    [
        ({"is_causal": True}, (2, 3, 33, 4), torch.float32),
        ({}, (2, 3, 33, 4), torch.float64),
        ({}, (2, 3, 33, 4), torch.float16),
        ({}, (1, 2, 33, 256), torch.float32),
    ],
)
def test_other_calls_keep_pytorchs_kernel(options, shape, dtype, counted):
    actual = run(inputs(*shape, dtype=dtype), **options)
    assert counted.calls == 0
    registry.restore_flash_attention_impl()
    for a, e in zip(actual, run(inputs(*shape, dtype=dtype), **options), strict=True):
        assert torch.equal(a, e)


@native
@needs_registry
def test_restoring_brings_pytorchs_kernel_back(counted):
    tensors = inputs(2, 3, 33, 4)
    before = run(tensors)
    for _ in range(2):  # and once more
        registry.activate_flash_attention_impl(register_flash_attention())
        assert registry.current_flash_attention_impl() == "LSMHA"
        run(tensors)
        registry.restore_flash_attention_impl()
        assert registry.current_flash_attention_impl() is None
    assert counted.calls == 4
    for a, e in zip(run(tensors), before, strict=True):
        assert torch.equal(a, e)
    assert counted.calls == 4


@native
def test_results_have_the_form_that_pytorch_expects_on_cuda():
    """Called on CPU tensors: what CUDA's operators return, without a GPU."""
    q, k, v, do = inputs(2, 3, 33, 4)
    results = flash.cuda_forward(q, k, v, scale=0.5)
    schema = torch.ops.aten._scaled_dot_product_flash_attention.default._schema
    assert len(results) == len(schema.returns)
    o, lse, _, _, max_q, max_k, state, offset, debug = results
    assert lse.shape == (2, 3, 33)
    assert (max_q, max_k, state.dtype, debug.numel()) == (33, 33, torch.uint64, 0)
    expected, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=0.5)
    torch.testing.assert_close(o, expected)
    grads = flash.cuda_backward(
        do, q, k, v, o, lse, None, None, 33, 33, 0.0, False, state, offset, scale=0.5
    )
    assert [g.shape for g in grads] == [t.shape for t in (q, k, v)]
    assert flash.cuda_forward(q, k, v, 0.1) is None
    assert flash.cuda_forward(q, k, v, return_debug_mask=True) is None


def test_without_a_registry_the_error_says_so(monkeypatch):
    monkeypatch.delattr(registry, "register_flash_attention_impl", raising=False)
    with pytest.raises(RuntimeError, match="no registry of flash attention implementations"):
        register_flash_attention()


@pytest.mark.gpu
@needs_registry
@pytest.mark.usefixtures("_active")
def test_on_a_gpu():
    tensors = [t.cuda() for t in inputs(2, 8, 64, 8, dtype=torch.bfloat16)]
    with registry.sdpa_kernel(registry.SDPBackend.FLASH_ATTENTION):
        actual = run(tensors)
    with registry.sdpa_kernel(registry.SDPBackend.MATH):
        low, high = run(tensors), run(tensors, torch.double)
    for i, group in enumerate(zip(actual, low, high, strict=True)):
        assert_no_worse(*group, factor=2 if i == 0 else 3)
