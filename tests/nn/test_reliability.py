"""Attention at its limits; what was measured is printed at the end of the test log."""

import os
import resource
import subprocess
import sys
import threading

import pytest
import torch

from lsmha_fast import LSMultiHeadAttention
from lsmha_fast._ext import ext_missing
from lsmha_fast.ops import attention, attention_packed, attention_with_weights

native = pytest.mark.skipif(ext_missing() is not None, reason=str(ext_missing()))
BACKENDS = ["reference", "sdpa", pytest.param("cpp", marks=native)]


@pytest.fixture
def figure(record_property):
    """Call it with a line for the end of the log."""
    return lambda line: record_property("figure", line)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_query_reaches_exactly_its_row(backend, value, figure):
    rows = 0
    # below 16 keys PyTorch's kernel makes zeros of a NaN, in nn.MultiheadAttention, too
    for N in (16, 17, 64, 65, 257) if backend == "sdpa" else (15, 16, 17, 64, 65, 257):
        q, k, v = torch.randn(3, 2, 3, N, 4)
        clean = attention_with_weights(q, k, v, backend=backend)
        bad = q.clone()
        bad[1, 2, N - 1] = value
        for t, e, place in zip(
            attention_with_weights(bad, k, v, backend=backend),
            clean,
            ([1, 2, N - 1], [1, N - 1]),
            strict=True,
        ):
            assert t.isnan().any(-1).nonzero().tolist() == [place]
            t[tuple(place)] = e[tuple(place)] = 0
            torch.testing.assert_close(t, e)
            rows += t[..., 0].numel() - 1
    figure(f"{value} in one query, {backend}: {rows} other rows are what they were")


@native
def test_a_masked_key_may_hold_anything():
    q, k, v = torch.randn(3, 2, 3, 33, 4)
    mask = torch.ones(2, 33, dtype=torch.bool)
    mask[:, 7] = False
    clean = attention_with_weights(q, k, v, key_mask=mask)
    k[:, :, 7], v[:, :, 7] = float("nan"), float("inf")
    for t, e in zip(attention_with_weights(q, k, v, key_mask=mask), clean, strict=True):
        assert torch.equal(t, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_ten_thousand(backend, figure):
    q = torch.full((1, 2, 20, 4), 1e4 / 2)
    q[:, 1] *= -1
    k = torch.randn(1, 2, 33, 4).sign()
    v = torch.randn(1, 2, 33, 4)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    exact = attention(*(t.double() for t in inputs), backend="reference")
    o = attention(*inputs, backend=backend)
    error = float((o - exact).detach().abs().max())
    assert error < 1e4 * 2**-23  # a logit's own rounding
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(o.sum(), inputs))
    figure(f"logits of +-1e4, {backend}: off by {error:.1e}, gradients finite")


@native
@pytest.mark.parametrize(
    "name, shapes",
    [
        ("D from 1 to 256", [(2, 2, 17, 19, D) for D in range(1, 257)]),
        ("H up to 256", [(1, H, 17, 19, 3) for H in (1, 2, 3, 5, 16, 100, 255, 256)]),
        (
            "N at tile sizes, and one more and less",
            [
                (1, 2, n + d, m + d, 4)
                for n in (16, 32, 64, 256, 512)
                for m in (64, 256)
                for d in (-1, 0, 1)
            ],
        ),
    ],
)
def test_error_over_sizes(name, shapes, figure):
    """Over all sizes together, so that no single lucky result of PyTorch's decides."""
    errors = torch.zeros(2, 2).double()  # (native, plain) x (output, weights)
    for B, H, L, S, D in shapes:
        q, k, v = (torch.randn(B, H, n, D) for n in (L, S, S))
        exact = attention_with_weights(q.double(), k.double(), v.double(), backend="reference")
        for row, backend in enumerate(("cpp", "reference")):
            results = attention_with_weights(q, k, v, backend=backend)
            for column, (t, e) in enumerate(zip(results, exact, strict=True)):
                errors[row, column] += (t - e).norm() / e.norm()
    ratios = errors[0] / errors[1]
    assert (ratios <= 2).all()
    figure(f"{name}: error {ratios[0]:.2f} (output), {ratios[1]:.2f} (weights) of plain PyTorch's")


@native
def test_more_than_2_31_elements():
    """Heads 2^31 elements apart: only the pages in use are ever there."""
    try:
        memory = torch.empty(2**31 + 2**12, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no address space for 4 GB")
    far = [memory.as_strided((1, 2, 16, 4), (0, 2**31, 4, 1), 64 * i) for i in range(3)]
    near = [torch.randn(1, 2, 16, 4).bfloat16() for _ in range(3)]
    for t, value in zip(far, near, strict=True):
        t.copy_(value)
    for t, e in zip(attention_with_weights(*far), attention_with_weights(*near), strict=True):
        assert torch.equal(t, e)


def test_predicate_for_rows_that_32_bits_cannot_count():
    pytest.importorskip("triton")
    from lsmha_fast.ops.attention._triton import _block_fits_32_bits

    def apart(stride):
        return torch.empty_strided((1, 1, 4, 2), (1, 1, stride, 1), device="meta")

    fits, too_far = apart(2**23 - 1), apart(2**23)
    assert _block_fits_32_bits(fits) is fits
    assert _block_fits_32_bits(too_far).stride() == (8, 8, 2, 1)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_ten_thousand_calls_with_flat_memory(figure):
    module = LSMultiHeadAttention(16, 8, 0.1, batch_first=True)
    x = torch.randn(2, 9, 16)

    def calls(n):
        for i in range(n):
            out = module(x, x, x, need_weights=i % 2 == 0)[0]
            if i % 4 < 2:
                out.sum().backward()

    calls(500)
    before = resident()
    calls(10_000)
    grown = resident() - before
    assert grown < 2**22
    figure(f"10,000 calls: {grown / 2**20:.1f} MB more memory")


OUT_OF_MEMORY = """
import resource, torch
from lsmha_fast.ops import attention, attention_packed, attention_weights
torch.set_num_threads(2)
qkv = torch.randn(2, 40, 3, 4, 5)
before = attention_packed(qkv)
q = torch.randn(1, 4, 8, 5)
far = torch.randn(1, 4, 1, 5).expand(1, 4, 2**27, 5)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
for function, args in ((attention, (q, far, far)), (attention_weights, (q, far))):
    for backend in ("cpp", "reference"):
        try:
            function(*args, backend=backend)
        except (RuntimeError, MemoryError) as error:
            print(type(error).__name__, str(error).splitlines()[0][:70])
        else:
            raise SystemExit(f"{function.__name__} by {backend} found the memory")
assert torch.equal(attention_packed(qkv), before)
print("works on")
"""


@native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and RLIMIT_AS")
def test_out_of_memory_is_an_error_and_leaves_a_working_process():
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "works on"


def test_two_threads_at_once(figure):
    """Output, weights and gradients of each thread have the bits they have alone."""
    inputs = [torch.randn(2, 33, 3, 6, 4) for _ in range(8)]

    def work(x):
        x = x.clone().requires_grad_()
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        out, weights = attention_with_weights(q, k, v)
        loss = attention_packed(x).square().sum() + (out * 2).sum() + weights.square().sum()
        return [out.detach(), weights.detach(), *torch.autograd.grad(loss, x)]

    alone = [work(x) for x in inputs]
    failures, rounds = [], 10

    def thread(mine):
        try:
            for _ in range(rounds):
                for i in mine:
                    for t, e in zip(work(inputs[i]), alone[i], strict=True):
                        assert torch.equal(t, e)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=thread, args=(range(n, 8, 2),)) for n in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []
    figure(f"two threads at once: {rounds * len(inputs)} calls, the bits of one thread")


def test_weights_of_a_training_module_are_those_it_used(figure):
    """While training the weights are those after dropout, as in nn.MultiheadAttention."""
    module = LSMultiHeadAttention(16, 4, 0.5, batch_first=True)
    x = torch.randn(3, 40, 16)
    torch.manual_seed(0)
    out, each = module(x, x, x, average_attn_weights=False)
    torch.manual_seed(0)
    again, average = module(x, x, x)
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(each.mean(1), average)
    v = module._project_inputs(x, x, x)[2].transpose(1, 2)
    torch.testing.assert_close(module.project((each @ v).transpose(1, 2)), out)
    dropped = float((each == 0).float().mean())
    assert abs(dropped - 0.5) < 0.02
    figure(f"dropout 0.5: {dropped:.3f} of the returned weights are zero")
