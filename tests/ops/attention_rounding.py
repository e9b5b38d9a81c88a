"""The CUDA forward kernel's arithmetic on a CPU, to the bit: every rounding in its place and order.

A tensor core's sum is written as the shim of tests/cuda has it, one fp32 addition per product in
the order of the contraction; a device adds several products at once, so there these bits are a
bound and not a promise. Covers up to 32 queries (one tile) without a mask, with dropout and
head_scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsmha_fast.ops.attention import reference
from lsmha_fast.ops.attention.common import Inputs, dropout_rule

LOG2E, LN2 = torch.tensor(1.4426950408889634), torch.tensor(0.6931471805599453)
TF32_BITS = -0x2000  # the mask of what a tf32 operand keeps
POLYNOMIAL = [float.fromhex(c) for c in
              ("0x1.c3f760p-5", "0x1.f0de1ap-3", "0x1.62f31ap-1", "0x1.fff692p-1")]  # fmt: skip
POLYNOMIAL_LIMIT = 125.0


def forward(a: Inputs) -> tuple[Tensor, Tensor]:
    """o (B, H, L, D) in the inputs' dtype and lse (B, H, L), as the kernel rounds them."""
    single = a.q.dtype == torch.float32
    factor = torch.tensor(a.scale) * LOG2E
    start = torch.zeros(*a.q.shape[:3], 1)
    logits = logits_fp32 if single else logits_half
    emulated = torch.zeros((), dtype=torch.bool)
    if not single and a.seed is None:
        emulated = emulated_weights(a.q.shape[2], a.k.shape[2])
    s = logits(a, factor, start, exact=False)
    p, peak = weights(s, emulated, exact=False)
    values, total = product(p, a, single)
    least = 2.0**-4 if a.q.dtype == torch.float16 else 2.0**-24
    sound = ((total >= least) & (total <= 2.0**24)).all() and peak <= POLYNOMIAL_LIMIT
    if not sound:  # as one tile of 32 queries of one head
        headroom = 15.0 if a.q.dtype == torch.float16 else 0.0
        start = headroom - maxima(a, factor)
        p, _ = weights(logits(a, factor, start, exact=True), emulated, exact=True)
        values, total = product(p, a, single)
    inverse = reciprocal(total, single)
    scale = torch.tensor(dropout_rule(a.dropout_p)[1] if a.seed is not None else 1.0)
    if a.head_scale is not None:
        scale = scale * a.head_scale.float()[:, None]
    o = values * (inverse * scale)[..., None]
    lse = fma(-start[..., 0], LN2, flush(total.double().log2().float()) * LN2)
    return o.to(a.q.dtype), lse


def fma(a: Tensor, b, c) -> Tensor:
    """a b + c, rounded once."""
    a, b, c = (torch.as_tensor(x).double() for x in (a, b, c))
    product = a * b  # exact: 48 bits
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    # rounded to odd where fp64 does not hold the sum, so that the next rounding sees what was lost
    even = (total.view(torch.int64) & 1) == 0
    odd = torch.nextafter(total, total + error.sign() * total.abs())
    return torch.where((error != 0) & even, odd, total).float()


def flush(x: Tensor) -> Tensor:
    """Subnormal numbers count as zero."""
    return x.masked_fill(x.abs() < 2.0**-126, 0)


def reciprocal(x: Tensor, single: bool) -> Tensor:
    r = 1 / x
    return fma(r, fma(-x, r, 1.0), r) if single else r


def add_products(s: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """s (..., L, S) plus left (..., L, K) times right (..., K, S), one k after the other."""
    for k in range(left.shape[-1]):
        s = s + left[..., k : k + 1] * right[..., k : k + 1, :]
    return s


# ---- 16 bits: q as it is, factor times k in two parts ----


def split_half(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = 65504.0 if dtype == torch.float16 else torch.inf
    high = x.clamp(-largest, largest).to(dtype).float()
    return high, (x - high).to(dtype).float()


def logits_half(a: Inputs, factor: Tensor, start: Tensor, *, exact: bool) -> Tensor:
    high, low = split_half(a.k.float() * factor, a.q.dtype)
    s, q = start.expand(-1, -1, -1, a.k.shape[2]), a.q.float()
    return add_products(add_products(s, q, high.mT), q, low.mT)


def exp2(x: Tensor) -> Tensor:
    return flush(flush(x).double().exp2().float())


def exp2_polynomial(x: Tensor) -> Tensor:
    """2^x for |x| <= 125: 2^n by its exponent's bits, a polynomial of degree 3 for the rest."""
    shifted = x + 12582912.0
    f = x - (shifted - 12582912.0)
    p = fma(f, POLYNOMIAL[0], POLYNOMIAL[1])
    for c in POLYNOMIAL[2:]:
        p = fma(p, f, c)
    return (p.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)


def emulated_weights(L: int, S: int) -> Tensor:
    """Two of a thread's eight are polynomials: odd keys of rows 8 to 15 of 16. (L, S)"""
    return (torch.arange(S) % 2 == 1) & (torch.arange(L) % 16 >= 8)[:, None]


def weights(s: Tensor, emulated: Tensor, *, exact: bool) -> tuple[Tensor, float]:
    """2^s and the largest |s| that went to the polynomial."""
    x = s.clamp_min(-POLYNOMIAL_LIMIT) if exact else s
    peak = float(s.abs().masked_fill(~emulated, 0).max())
    return torch.where(emulated, exp2_polynomial(x), exp2(s)), peak


# ---- fp32: both factors in three tf32 parts ----


def split_single(x: Tensor, factor) -> tuple[Tensor, Tensor, Tensor]:
    def rounded(t):
        return truncated((t.view(torch.int32) + 0x1000).view(torch.float32))

    high = rounded(x * factor)
    left = fma(x, factor, -high)
    low = rounded(left)
    return high, low, truncated(left - low)


def truncated(x: Tensor) -> Tensor:
    return (x.contiguous().view(torch.int32) & TF32_BITS).view(torch.float32)


def logits_fp32(a: Inputs, factor: Tensor, start: Tensor, *, exact: bool) -> Tensor:
    """Up to 4 channels of one term each in a product; what is large comes last, or first where it
    meets the row's maximum. More than 4 channels have their third parts only then."""
    q = [pad(t) for t in split_single(a.q, torch.tensor(1.0))]
    k = [pad(t).mT for t in split_single(a.k, factor)]
    narrow, step = q[0].shape[-1] == 4, min(q[0].shape[-1], 8)
    terms = [(1, 1), (1, 0), (0, 1)]
    if narrow:
        terms = [(0, 2), (2, 0), *terms]
    elif exact:
        terms = [(2, 0), (0, 2), *terms]
    s = start.expand(-1, -1, -1, a.k.shape[2])
    for part in [[(0, 0)], terms] if exact else [terms, [(0, 0)]]:
        for c in range(0, q[0].shape[-1], step):
            for i, j in part:
                s = add_products(s, q[i][..., c : c + step], k[j][..., c : c + step, :])
    return s


def pad(x: Tensor) -> Tensor:
    """Zeros up to 4, 8 or 16 channels."""
    D = x.shape[-1]
    return torch.nn.functional.pad(x, (0, (4 if D <= 4 else 8 if D <= 8 else 16) - D))


def maxima(a: Inputs, factor: Tensor) -> Tensor:
    """Largest logit of each row (B, H, L, 1), coarsely in fp32."""
    start = torch.zeros(*a.q.shape[:3], 1)
    if a.q.dtype != torch.float32:
        return logits_half(a, factor, start, exact=True).amax(-1, keepdim=True)
    q = [pad(t) for t in split_single(a.q, torch.tensor(1.0))]
    k = [pad(t).mT for t in split_single(a.k, factor)]
    s, step = start.expand(-1, -1, -1, a.k.shape[2]), min(q[0].shape[-1], 8)
    for part in ([(1, 0), (0, 1)], [(0, 0)]):
        for c in range(0, q[0].shape[-1], step):
            for i, j in part:
                s = add_products(s, q[i][..., c : c + step], k[j][..., c : c + step, :])
    return s.amax(-1, keepdim=True)


# ---- weights times values, and their sum ----


def product(p: Tensor, a: Inputs, single: bool) -> tuple[Tensor, Tensor]:
    """Sums over the keys of kept weights times values (B, H, L, D) and of all weights (B, H, L)."""
    B, H, L, S = p.shape
    keep = torch.ones(B, H, L, S)
    if a.seed is not None:
        keep = reference.keep_mask(a.seed, (B, H, L, S), a.dropout_p).float()
    ones = torch.ones(B, H, S, 1)
    run = product_fp32 if single else product_half
    return run(p, keep, a.v), run(p, torch.ones_like(keep), ones.to(a.v.dtype))[..., 0]


def product_half(p: Tensor, keep: Tensor, v: Tensor) -> Tensor:
    zero = torch.zeros(*p.shape[:3], v.shape[-1])
    return add_products(zero, p.to(v.dtype).float() * keep, v.float())


def product_fp32(p: Tensor, keep: Tensor, v: Tensor) -> Tensor:
    """In two parts each; 32 keys are added up before they join the rest."""
    high = truncated((p.view(torch.int32) + 0x1000).view(torch.float32))
    low = truncated(p - high)
    v_high, v_low, _ = split_single(v, torch.tensor(1.0))
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    total = torch.zeros(*p.shape[:3], v.shape[-1])
    padding = -p.shape[-1] % 32
    high, low = (torch.nn.functional.pad(t * keep, (0, padding)) for t in (high, low))
    v_high, v_low = (torch.nn.functional.pad(t, (0, 0, 0, padding)) for t in (v_high, v_low))
    for first in range(0, high.shape[-1], 32):
        part = torch.zeros_like(total)
        for octet in range(first, first + 32, 8):
            keys = octet + order
            for w, values in ((low, v_low), (low, v_high), (high, v_low), (high, v_high)):
                part = add_products(part, w[..., keys], values[..., keys, :])
        total = total + part
    return total
