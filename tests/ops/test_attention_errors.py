"""Which backend attention takes, which calls it refuses, and what it says."""

import pytest
import torch

from lsmha_fast import _ext
from lsmha_fast.ops import attention, attention_packed, attention_weights
from lsmha_fast.ops.attention import op


def test_default_backend_never_interprets(monkeypatch):
    q = torch.randn(1, 2, 3, 4)
    bias = torch.zeros(1, 2, 3, 3, requires_grad=True)
    monkeypatch.setitem(op.CHECKS, "cpp", lambda *_: "it is not built")
    assert op.default_backend(q) == "sdpa"
    assert op.default_backend(q, bias=bias.detach()) == "sdpa"
    assert op.default_backend(q, bias=bias) == "reference"
    assert op.default_backend(q, dropout_p=0.1) == "reference"


@pytest.mark.skipif(_ext.ext_missing() is not None, reason=str(_ext.ext_missing()))
def test_default_backend_with_native_kernels():
    q = torch.randn(1, 2, 3, 4)
    bias = torch.zeros(1, 2, 3, 3, requires_grad=True)
    wide = torch.randn(1, 2, 3, 256)
    assert op.default_backend(q) == "cpp"
    assert op.default_backend(q, bias=bias, dropout_p=0.1) == "cpp"
    assert op.default_backend(wide) == "sdpa"
    assert op.default_backend(wide, dropout_p=0.1) == "cpp"
    assert op.default_backend(q.double()) == "sdpa"
    assert op.default_backend(q.half()) == "sdpa"


def test_unknown_backend_is_an_error():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="unknown backend 'cudnn'; choose from reference, sdpa"):
        attention(q, q, q, backend="cudnn")


@pytest.mark.parametrize(
    "backend, dtype, D, options, reason",
    [
        ("sdpa", torch.float32, 4, {"dropout_p": 0.1}, "no control over dropout"),
        ("sdpa", torch.float32, 4, {"bias": torch.zeros(3, requires_grad=True)}, "no gradient"),
        ("triton", torch.float64, 4, {}, "float64 is not one of"),
        ("triton", torch.float32, 65, {}, "head dim 65 exceeds 64"),
    ],
)
def test_named_backend_refuses_what_it_cannot_do(backend, dtype, D, options, reason):
    q = torch.randn(1, 2, 3, D, dtype=dtype)
    with pytest.raises(RuntimeError, match=reason):
        attention(q, q, q, backend=backend, **options)


GOOD = {"q": (2, 3, 4, 5), "k": (2, 3, 6, 5), "v": (2, 3, 6, 5)}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"q": torch.zeros(3, 4, 5)}, r"expected q \(B, H, L, D\)"),
        ({"k": torch.zeros(2, 3, 6, 4)}, r"k \(2, 3, 6, 4\)"),
        ({"v": torch.zeros(2, 3, 7, 5)}, r"v \(2, 3, 7, 5\)"),
        ({"k": torch.zeros(2, 1, 6, 5), "v": torch.zeros(2, 1, 6, 5)}, r"k \(2, 1, 6, 5\)"),
        ({"v": torch.zeros(2, 3, 6, 5).half()}, "expected v like q"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, r"\(2, 6\) bool, got \(2, 4\)"),
        ({"key_mask": torch.ones(2, 6)}, r"got \(2, 6\) torch.float32"),
        ({"bias": torch.zeros(2, 1, 1)}, r"\(2, 3, 4, 6\), got \(2, 1, 1\)"),
        ({"bias": torch.zeros(1, 2, 3, 4, 6)}, "broadcasts"),
        ({"bias": torch.zeros(4, 6, dtype=torch.bool)}, "got .* torch.bool"),
        ({"head_scale": torch.ones(2)}, r"\(H,\) = \(3,\) float, got \(2,\)"),
        ({"dropout_p": 1.5}, "between 0 and 1, got 1.5"),
        ({"scale": -1.0}, "scale must be finite and > 0, got -1.0"),
        ({"scale": float("nan")}, "got nan"),
    ],
)
def test_bad_arguments_are_errors(wrong, message):
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()} | wrong
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


@pytest.mark.parametrize("shape", [(2, 4, 2, 3, 5), (2, 4, 3, 5), (2, 4, 3, 0, 5), (2, 4, 3, 3, 0)])
def test_bad_packed_shape_is_an_error(shape):
    with pytest.raises(ValueError, match="expected qkv"):
        attention_packed(torch.zeros(shape))


def test_bad_weights_shape_is_an_error():
    with pytest.raises(ValueError, match="expected q"):
        attention_weights(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 6))
