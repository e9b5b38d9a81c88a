"""The model of the CUDA kernel's rounding: the error rule accepts it, the kernel has its bits."""

import attention_rounding
import pytest
import torch
from attention_fwd_shim import forward
from test_attention_cuda import DTYPES, in_double, make, needs_compiler

from lsmha_fast.ops.attention import reference
from lsmha_fast.testing import assert_no_worse

CASES = {
    "plain": {},
    "options": {"head_scale": True, "dropout_p": 0.2},
    "sharp": {"sharp": 8.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("D", [1, 4, 7, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_rule_accepts_the_model(dtype, D, case):
    a = make((2, 3, 32, 80, D), dtype, **CASES[case])
    o, lse = attention_rounding.forward(a)
    (low, low_lse), (high, high_lse) = reference.attention(a), reference.attention(in_double(a))
    assert_no_worse(o, low, high)
    # the sum is that of rounded weights: of one weight's rounding at most, half a unit
    rounded = torch.finfo(dtype).eps / 2
    assert (lse - high_lse).abs().max() <= rounded + 4 * (low_lse - high_lse).abs().max()


@needs_compiler
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("D", [1, 3, 4, 7, 8, 13, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_has_the_bits_of_the_model(dtype, D, case):
    a = make((2, 3, 32, 80, D), dtype, **CASES[case])
    for mine, kernels in zip(attention_rounding.forward(a), forward(a), strict=True):
        assert torch.equal(mine, kernels)


def test_the_polynomial():
    """Error over all of its fraction, and exact powers of two in the exponent."""
    x = torch.linspace(-0.5, 0.5, 20001)
    p = attention_rounding.exp2_polynomial(x)
    assert ((p.double() - x.double().exp2()) / x.double().exp2()).abs().max() < 7.6e-5
    for n in (-125, -30, 30, 125):
        y = attention_rounding.exp2_polynomial(x[1:-1] + n)
        assert ((y.double() / (x[1:-1] + n).double().exp2()) - 1).abs().max() < 7.7e-5
