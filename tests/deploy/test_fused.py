"""The fused inference form: its function, and its launches, counted under Triton's interpreter."""

import copy
from unittest import mock

import pytest
import torch
from test_optimize import randomise
from torch.utils._python_dispatch import TorchDispatchMode

from lsmha_fast import create_model
from lsmha_fast.deploy import fused, optimize
from lsmha_fast.ops._triton_utils import INTERPRET
from lsmha_fast.ops.block import op
from lsmha_fast.testing import assert_no_worse

pytest.importorskip("triton")
OPTIONS = {
    "published": {},
    "pre-norm": {"pre_norm": True},
    "heads of their own width": {"num_heads": 5, "head_dim": 3},
    "a convolution first": {"conv_blocks": 1},
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Tokens take the fused ops, and these the Triton kernels."""
    monkeypatch.setattr(fused, "takes", lambda x: True)
    monkeypatch.setitem(op.ORDER, "cpu", ("triton",))


def make(**options):
    small = {"dim": 32, "depth": 2, "num_heads": 8, "backend": "reference", **options}
    return randomise(create_model("cct_2_3x2_16", 10, **small))


@pytest.mark.parametrize("name", OPTIONS)
def test_fused_model_is_no_worse_than_eager(name):
    model, images = make(**OPTIONS[name]), torch.randn(2, 3, 16, 16)
    form = optimize(model, images[:0], packed=False)
    with torch.no_grad():
        high = copy.deepcopy(model).double()(images.double())
        assert_no_worse(form(images), model(images), high)


class Launches(TorchDispatchMode):
    """Names of what would be launched on a GPU: kernels of Triton, and operators that compute.

    Our ops run with the mode off; `wrap` turns it on again inside a backend's function. Kernels are
    named and not run, so that values mean nothing.
    """

    # allocations
    FREE = ("empty", "new_empty", "empty_like", "_unsafe_view")

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if name == "contiguous":  # its schema says that it aliases, but it may copy
            view = out.data_ptr() == args[0].data_ptr()
        if not view and name not in self.FREE and not name.startswith("lsmha_fast::"):
            self.names.append(name)
        return out

    def wrap(self, function):
        def run(*args):
            with self:
                return function(*args)

        return run

    def kernel(self, kernel, *args, grid, warmup, **kwargs):
        self.names.append(kernel.__name__)


def launches(form, images):
    """Names of the launches of the stem, of every block, and of the head."""
    from triton.runtime.interpreter import InterpretedFunction

    from lsmha_fast.ops.attention import _triton as attention
    from lsmha_fast.ops.block import _triton as block
    from lsmha_fast.ops.conv_stem import _triton as conv_stem

    found = []

    def part(module, x):
        mode = Launches()
        with mock.patch.object(InterpretedFunction, "run", lambda *a, **k: mode.kernel(*a, **k)):
            patches = [
                mock.patch.object(backend, name, mode.wrap(getattr(backend, name)))
                for backend, names in {
                    attention: ["attention"],
                    block: ["norm_linear", "project_mlp", "norm_pool_linear"],
                    conv_stem: ["conv_stem"],
                }.items()
                for name in names
            ]
            with torch.no_grad(), mode:
                for patch in patches:
                    patch.start()
                x = module(x)
                for patch in patches:
                    patch.stop()
        found.append(mode.names)
        return x

    x = part(form.stem, images)
    for layer in form.blocks:
        x = part(layer, x)
    part(lambda x: form.head(x).float(), x)
    return found


BLOCK = ["_norm_linear", "_attention_fwd"]
FEW = [*BLOCK, "_project_fc1", "_fc2"]
MANY = [*BLOCK, "_project_mlp"]


def count(batch, **options):
    """Launches for cct_7_3x1_32 in fp16: 256 tokens of 256 channels."""
    model = create_model("cct_7_3x1_32", 100, num_heads=64, backend="triton", **options)
    form = optimize(model.eval(), torch.zeros(0, 3, 32, 32), packed=False).half()
    form.stem.dtype = form.dtype = torch.float16
    return launches(form, torch.zeros(batch, 3, 32, 32))


interpreted = pytest.mark.skipif(not INTERPRET, reason="counts interpreted kernels")
STEM = ["_to_copy", "_conv_stem_fwd", "add"]


@interpreted
@pytest.mark.parametrize("pre_norm", [False, True], ids=["published", "pre-norm"])
@pytest.mark.parametrize("batch, expected", [(1, FEW), (24, FEW), (25, MANY)])
def test_a_block_is_at_most_four_launches(batch, expected, pre_norm):
    """25 images are more than 48 x 132 rows."""
    stem, *blocks, head = count(batch, pre_norm=pre_norm)
    assert stem == STEM
    assert blocks == [expected] * 7
    assert head == ["_norm_pool_linear"]
    assert len(expected) <= 4
    assert sum(map(len, (stem, *blocks, head))) <= 32


@interpreted
def test_without_fused_ops_a_block_is_ten_launches(monkeypatch):
    monkeypatch.setattr(fused, "takes", lambda x: False)
    stem, *blocks, head = count(1)
    assert stem == STEM
    assert [len(names) for names in blocks] == [10] * 7
    assert len(head) == 5


@interpreted
def test_copies_inside_an_op_are_counted():
    """In fp32 the stem sorts the filters of both layers, each by a launch of its own."""
    model = create_model("cct_2_3x2_32", 10, num_heads=16, backend="triton")
    form = optimize(model.eval(), torch.zeros(0, 3, 32, 32), packed=False)
    stem, *_ = launches(form, torch.zeros(1, 3, 32, 32))
    assert stem.count("contiguous") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype, batch, monkeypatch):
    model = randomise(create_model("cct_7_3x1_32", 100, num_heads=64)).cuda()
    images = torch.randn(batch, 3, 32, 32, device="cuda")
    form = optimize(model, images, dtype=dtype)
    with torch.no_grad():
        high = copy.deepcopy(model).double()(images.double())
        out = form(images).to(dtype)
        monkeypatch.setattr(fused, "takes", lambda x: False)
        assert_no_worse(out, form(images).to(dtype), high)
