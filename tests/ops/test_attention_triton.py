"""The Triton kernels of attention, in the interpreter where there is no GPU."""

import pytest
import torch
from attention_cases import assert_backend_is_exact, make_inputs, packed, run

from lsmha_fast.ops import attention, attention_packed
from lsmha_fast.ops.attention import reference
from lsmha_fast.testing import assert_no_worse, nan_filled_empty

pytestmark = pytest.mark.triton
DTYPES = [torch.float32, torch.float16]
HEAD_DIMS = [1, 2, 3, 4, 5, 8, 13, 16, 32]


def check(shape, dtype, device, function=attention, **options):
    tensors, options = make_inputs(shape, dtype, device=device, **options)
    if function is attention_packed:
        tensors = packed(tensors)
    with nan_filled_empty():
        assert_backend_is_exact("triton", dtype, tensors, options, function)


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims(D, dtype, device):
    check((2, 2, 17, 17, D), dtype, device, masked=D % 2 == 0)


@pytest.mark.parametrize("L, S", [(65, 65), (130, 130), (1, 65), (70, 1030), (300, 17)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(L, S, dtype, device):
    check((1, 2, L, S, 4), dtype, device)


@pytest.mark.parametrize("bias", [(6, 65, 70), (2, 1, 1, 70), (65, 70), (2, 6, 1, 70)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options_together(dtype, bias, device):
    # with few heads the largest error of the reference's head_scale gradient can be small by luck
    check((2, 6, 65, 70, 3), dtype, device, masked=True, bias=bias, head_scale=True, dropout_p=0.2)


@pytest.mark.parametrize("bias", [(2, 65, 1), (1,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_that_shifts_whole_rows(dtype, bias, device):
    """Softmax ignores it, so its gradient is zero but for the rounding of what sums up to zero:
    at most one rounding of each term of ds = p (dp - delta), delta = rowsum(do o)."""
    tensors, options = make_inputs((2, 2, 65, 66, 3), dtype, bias=bias, device=device)
    dbias = run("triton", dtype, tensors, options)[4]
    q, k, v, do = tensors
    p = torch.softmax(q @ k.mT * 3**-0.5, -1)
    terms = p * ((do.abs() @ v.mT.abs()) + (do.abs() * (p @ v).abs()).sum(-1, keepdim=True))
    assert (dbias.abs() <= torch.finfo(dtype).eps * terms.sum_to_size(dbias.shape)).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masked": True},
        {"bias": (3, 70, 70)},
        {"dropout_p": 0.5},
        {"head_scale": True},
        {"masked": True, "dropout_p": 0.1},
    ],
)
def test_packed(options, device):
    check((2, 3, 70, 70, 4), torch.float16, device, attention_packed, **options)


def test_many_key_blocks_with_every_option(device):
    options = {"masked": True, "head_scale": True, "dropout_p": 0.1}
    check((2, 2, 40, 600, 2), torch.float16, device, **options)


def test_one_token(device):
    # the softmax of one key is 1: o = v, dv = do up to the rounding of the log-sum-exp, and dq, dk
    # are noise around zero
    tensors, options = make_inputs((2, 3, 1, 1, 4), torch.float32, device=device)
    q, k, v, do = (t.float() for t in tensors)
    o, dq, dk, dv = run("triton", torch.float32, tensors, options)
    assert torch.equal(o, v)
    torch.testing.assert_close(dv, do)
    noise = 4 * 2**-24 * (do.abs() * v.abs()).sum(-1, keepdim=True)
    assert (dq.abs() <= noise * k.abs()).all()
    assert (dk.abs() <= noise * q.abs()).all()


def test_strided_views(device):
    """Expanded, transposed to a strided last dimension, sliced out of wider tensors."""
    B, H, L, S, D = 2, 3, 20, 33, 4
    wide = torch.randn(B, S, H, D + 3, device=device)
    q = torch.randn(B, H, D, L, device=device).mT
    k = torch.randn(1, H, S, D, device=device).expand(B, H, S, D)
    v = wide[..., 1 : D + 1].transpose(1, 2)
    strided = [t.detach().requires_grad_() for t in (q, k, v)]
    dense = [t.detach().contiguous().requires_grad_() for t in (q, k, v)]
    do = torch.randn(B, H, L, 1, device=device).expand(B, H, L, D)
    results = []
    for inputs in (strided, dense):
        o = attention(*inputs, backend="triton")
        results.append((o, *torch.autograd.grad(o, inputs, do)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def kernel_keep_masks(shape, dropout_p, device):
    """The masks that forward and backward apply: with equal logits, unit vectors as values make
    the output show the weights, and as output gradients they make dv show them."""
    B, H, L, S = shape
    D = 64
    forward, backward = [], []
    for first in range(0, max(L, S), D):
        q, k = (torch.zeros(B, H, n, D, device=device) for n in (L, S))
        v = torch.eye(max(L, S) + D, device=device)[:S, first : first + D].expand(B, H, S, D)
        do = torch.eye(max(L, S) + D, device=device)[:L, first : first + D].expand(B, H, L, D)
        v = v.detach().clone().requires_grad_()
        torch.manual_seed(3)
        o = attention(q, k, v, dropout_p=dropout_p, backend="triton")
        forward.append(o.detach() > 0)
        backward.append(torch.autograd.grad(o, v, do)[0].mT > 0)
    return torch.cat(forward, -1)[..., :S], torch.cat(backward, -2)[..., :L, :]


@pytest.mark.parametrize("shape", [(2, 2, 65, 130), (1, 3, 5, 40)])
def test_dropout_bits_equal_the_reference(shape, device):
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device=device)
    expected = reference.keep_mask(seed, shape, 0.3)
    forward, backward = kernel_keep_masks(shape, 0.3, device)
    assert torch.equal(forward, expected)
    assert torch.equal(backward, expected)


def test_dropping_everything_gives_zeros(device):
    tensors, options = make_inputs((1, 2, 5, 7, 4), torch.float32, device=device, dropout_p=1.0)
    for backend in ("reference", "triton"):
        assert all((t == 0).all() for t in run(backend, torch.float32, tensors, options))


def corrupted(tensors, row):
    q = tensors[0].float().clone()
    q[0, 0, row] = torch.nan
    return q


def test_nan_stays_in_its_row(device):
    tensors, _ = make_inputs((1, 2, 70, 70, 4), torch.float32, device=device)
    q, k, v, _ = (t.float() for t in tensors)
    clean = attention(q, k, v, backend="triton")
    o = attention(corrupted(tensors, 3), k, v, backend="triton")
    assert o[0, 0, 3].isnan().all()
    clean[0, 0, 3] = o[0, 0, 3] = 0
    assert torch.equal(o, clean)


def test_permuting_tokens_permutes_the_output(device):
    tensors, _ = make_inputs((2, 2, 70, 70, 4), torch.float32, device=device)
    q, k, v, _ = tensors
    order = torch.randperm(70, device=device)
    o = attention(*(t[:, :, order].float() for t in (q, k, v)), backend="triton")
    low = attention(q.float(), k.float(), v.float(), backend="reference")[:, :, order]
    assert_no_worse(o, low, attention(q, k, v, backend="reference")[:, :, order])


def test_result_does_not_depend_on_the_batch(device):
    tensors, options = make_inputs((3, 2, 66, 66, 4), torch.float16, device=device)
    whole = run("triton", torch.float16, tensors, options)
    alone = run("triton", torch.float16, [t[1:2] for t in tensors], options)
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a[1:2], b)


def test_same_seed_same_bits(device):
    options = {"bias": (2, 66, 66), "head_scale": True, "dropout_p": 0.2, "masked": True}
    tensors, options = make_inputs((2, 2, 66, 66, 4), torch.float16, device=device, **options)
    first, second = (run("triton", torch.float16, tensors, options) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
