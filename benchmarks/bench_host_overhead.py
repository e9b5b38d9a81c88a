"""What a call costs beside its kernel: calls so small that the host's work is all there is.

Every function of the package against the best existing route and `torch.add`, whose kernel is as
small as a differentiable call can have. One thread; the methods of a case are measured in turns in
one process, on a CPU in processor time, and the median per call is what `benchmarks.record` keeps.
"""

import functools
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import DEVICE, info
from benchmarks.interleaved import medians
from lsmha_fast import LSMultiHeadAttention, ops

ROUNDS = 25
# other programs do not change the processor time of one thread
TIMER = time.process_time if DEVICE == "cpu" else time.perf_counter
B, N, H, D, C, K = 1, 8, 4, 4, 16, 3


def make(*shape):
    return torch.randn(shape, device=DEVICE)


def attention_case():
    q, k, v = (make(B, H, N, D) for _ in range(3))
    return (q, k, v), {"ours": ops.attention, "sdpa": F.scaled_dot_product_attention}


def packed_case():
    def sdpa(qkv):
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return (make(B, N, 3, H, D),), {"ours": ops.attention_packed, "sdpa": sdpa}


def seq_pool_case():
    def eager(x, weight):
        p = torch.softmax(torch.einsum("bnhd,hd->bnh", x, weight), dim=1)
        return torch.einsum("bnh,bnhd->bhd", p, x)

    return (make(B, N, H, D), make(H, D)), {"ours": ops.seq_pool, "eager": eager}


def conv_stem_case():
    def eager(weight):
        image = F.max_pool2d(F.relu(F.conv2d(x, weight, None, 1, 1)), 3, 2, 1)
        return image.flatten(2).transpose(1, 2)

    x = make(B, 3, 4, 4)
    ours = functools.partial(ops.conv_stem, x, stride=1, padding=1)
    return (make(C, 3, 3, 3),), {"ours": ours, "eager": eager}


def module_case():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(C, H, batch_first=True, device=DEVICE)
    ours = LSMultiHeadAttention(C, H, batch_first=True, device=DEVICE)
    ours.load_state_dict(theirs.state_dict())

    def of(module):
        return lambda x: module(x, x, x, need_weights=False)[0]

    return (make(B, N, C),), {"ours": of(ours), "torch": of(theirs)}


def head_class_sums_case():
    """Sums carry no gradient: the modes that ask for one leave it out."""
    labels = torch.zeros(B, dtype=torch.int64, device=DEVICE)

    def eager(x, weight):
        p = torch.softmax(torch.einsum("bnhd,hd->bnh", x, weight), dim=1)
        pooled = torch.einsum("bnh,bnhd->bhd", p, x)
        return x.new_zeros(K, H, D).index_add_(0, labels, pooled)

    def ours(x, weight):
        return ops.head_class_sums(x, weight, labels, K)

    return (make(B, N, H, D), make(H, D)), {"ours": ours, "eager": eager}


CASES = {
    "attention": attention_case,
    "attention_packed": packed_case,
    "seq_pool": seq_pool_case,
    "conv_stem": conv_stem_case,
    "module": module_case,
    "head_class_sums": head_class_sums_case,
}
# gradients of the first argument
MODES = ("forward", "no_grad", "forward + backward")
OTHERS = {"attention": "sdpa", "attention_packed": "sdpa", "module": "torch"}


def runs():
    for case in CASES:
        for mode in ("no_grad",) if case == "head_class_sums" else MODES:
            for method in ("ours", OTHERS.get(case, "eager"), "add"):
                yield pytest.param(case, mode, method, id=f"{case}, {mode}-{method}")


def call_of(function, tensors, mode):
    """A function without arguments that runs one mode."""
    x, *rest = (t.clone() for t in tensors)
    if mode == "no_grad":

        def run():
            with torch.no_grad():
                return function(x, *rest)

        return run
    x.requires_grad_()
    if mode == "forward":
        return lambda: function(x, *rest)
    do = torch.ones_like(function(x, *rest))
    return lambda: torch.autograd.grad(function(x, *rest), x, do)


@functools.cache
def calls(case, mode):
    tensors, functions = CASES[case]()
    functions["add"] = lambda x, *_: torch.add(x, x)
    return {name: call_of(function, tensors, mode) for name, function in functions.items()}


@functools.cache
def seconds(case, mode):
    return medians(calls(case, mode), ROUNDS, TIMER)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(group="host-overhead", timer=TIMER, max_time=0.05)
@pytest.mark.parametrize("case, mode, method", runs())
def test_small_call(benchmark, case, mode, method):
    benchmark(calls(case, mode)[method])
    info(benchmark, seconds=seconds(case, mode)[method])
