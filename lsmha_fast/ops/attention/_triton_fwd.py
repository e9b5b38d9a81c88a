"""Forward kernel of attention, and the tile functions that the backward kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

# 7 rounds pass all statistical tests (Salmon et al., SC 2011); the reference has the same number
PHILOX_ROUNDS = tl.constexpr(7)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def head_of(ptr, stride, b, h, ALIGN: tl.constexpr):
    """Address of head `h` of image `b`; strides 0 to 2 are multiples of ALIGN, which the compiler
    cannot see when they are not multiples of 16, and needs for loads of more than one element."""
    return ptr + tl.multiple_of(b * stride[0] + h * stride[1], ALIGN)


@triton.jit
def load_rows(ptr, stride, first, N, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
              ALIGN: tl.constexpr):  # fmt: skip
    """Rows first.. of an (N, D) matrix as [BLOCK, BLOCK_D]; zeros outside.

    Addresses have 64 bits; the offsets inside a block fit 32 (the launcher sees to it).
    """
    ptr += tl.multiple_of(tl.cast(first, tl.int64) * stride[2], ALIGN)
    n, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    row = tl.multiple_of(n * stride[2], ALIGN)
    if D > 16 or ALIGN >= 4:
        mask = (n < N - first)[:, None] & (d < D)[None, :]
        return tl.load(ptr + row[:, None] + d[None, :] * stride[3], mask=mask, other=0.0)
    # where rows are too unaligned for vectors, a load per channel: one address for all of them
    x = tl.zeros([BLOCK, BLOCK_D], ptr.dtype.element_ty)
    for c in tl.static_range(D):
        channel = tl.load(ptr + row + c * stride[3], mask=n < N - first, other=0.0)
        x = tl.where((d == c)[None, :], channel[:, None], x)
    return x


@triton.jit
def store_rows(ptr, stride, first, N, x, D: tl.constexpr, BLOCK: tl.constexpr,
               BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Write [BLOCK, BLOCK_D] as rows first.. of an (N, D) matrix, in the dtype of `ptr`."""
    ptr += tl.multiple_of(tl.cast(first, tl.int64) * stride[2], ALIGN)
    n, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    row = tl.multiple_of(n * stride[2], ALIGN)
    if D > 3:
        mask = (n < N - first)[:, None] & (d < D)[None, :]
        x = x.to(ptr.dtype.element_ty)
        tl.store(ptr + row[:, None] + d[None, :] * stride[3], x, mask=mask)
    else:
        # one address for all channels; the sums cost more than that from 4 channels on
        for c in tl.static_range(D):
            channel = tl.sum(tl.where((d == c)[None, :], x, 0.0), 1).to(ptr.dtype.element_ty)
            tl.store(ptr + row + c * stride[3], channel, mask=n < N - first)


@triton.jit
def masked_scores(q, k, b, h, first, first_key, L, S, scale2, mask_ptr, mask_stride,
                  bias_ptr, bias_stride, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
                  WHOLE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores [BLOCK_L, BLOCK_S], -inf where the key is masked or past the end.

    With a bias they are base-2 logits; without one they are q.k, still to be multiplied by
    `scale2`, which then costs nothing (one fused multiply-add with the row's maximum).
    """
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    j = first_key + tl.arange(0, BLOCK_S)
    if bias_ptr is not None:
        rows, columns = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_S)
        bias_ptr += b * bias_stride[0] + h * bias_stride[1]
        bias_ptr += tl.cast(first, tl.int64) * bias_stride[2]
        bias_ptr += tl.cast(first_key, tl.int64) * bias_stride[3]
        offset = rows[:, None] * bias_stride[2] + columns[None, :] * bias_stride[3]
        inside = (rows < L - first)[:, None] & (columns < S - first_key)[None, :]
        bias = tl.load(bias_ptr + offset, mask=inside, other=0.0)
        s = s * scale2 + bias.to(tl.float32) * LOG2E
    if mask_ptr is not None:
        part = tl.load(mask_ptr + b * mask_stride[0] + j * mask_stride[1], mask=j < S, other=0)
        s = tl.where((part != 0)[None, :], s, -float("inf"))
    elif not WHOLE:
        s = tl.where((j < S)[None, :], s, -float("inf"))
    return s


@triton.jit
def keep_mask(seed_ptr, bh, first, first_key, threshold, BLOCK_L: tl.constexpr,
              BLOCK_S: tl.constexpr):  # fmt: skip
    """Dropout's mask [BLOCK_L, BLOCK_S]; see `reference.keep_mask` for the definition.

    The 8 half-words of one call go to keys 8 apart, which one thread of the tensor-core layout
    holds, so that joining them moves nothing between threads.
    """
    CALLS: tl.constexpr = BLOCK_S // 8
    zero = tl.zeros([BLOCK_L, CALLS], tl.int32)
    call = zero + (first_key // 8 + tl.arange(0, CALLS))[None, :]
    row = zero + (first + tl.arange(0, BLOCK_L))[:, None]
    seed = tl.load(seed_ptr)
    w0, w1, w2, w3 = tl.philox(seed, call, row, zero + bh, zero, PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [.., x, y] is word 2 x + y
    # compared in the upper half of a word, where every second half-word already is
    halves = tl.join(words << 16, words).reshape([BLOCK_L, CALLS // 8, 8, 2, 2, 2])
    halves = halves.permute([0, 1, 3, 4, 5, 2]).reshape([BLOCK_L, BLOCK_S])
    return halves >= tl.cast(threshold, tl.uint32) << 16


@triton.jit
def _attention_fwd(
    q_ptr, q_stride, k_ptr, k_stride, v_ptr, v_stride, mask_ptr, mask_stride, bias_ptr, bias_stride,
    head_scale_ptr, seed_ptr, o_ptr, o_stride, lse_ptr, H, L, S, scale2, threshold, keep_factor,
    D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, ONE_BLOCK: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head per program; program_id(1) shares its query tiles out."""
    bh = tl.program_id(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    q_ptr = head_of(q_ptr, q_stride, b, h, ALIGN)
    k_ptr = head_of(k_ptr, k_stride, b, h, ALIGN)
    v_ptr = head_of(v_ptr, v_stride, b, h, ALIGN)
    o_ptr = head_of(o_ptr, o_stride, b, h, ALIGN)
    lse_ptr += bh.to(tl.int64) * L
    ones = (tl.arange(0, BLOCK_D) == D)[None, :]
    # a spare column of ones in v makes the same product sum the softmax's denominator
    ONES: tl.constexpr = D < BLOCK_D and seed_ptr is None
    factor = scale2 if bias_ptr is None else 1.0
    gain = keep_factor
    if head_scale_ptr is not None:
        gain *= tl.load(head_scale_ptr + h).to(tl.float32)
    if ONE_BLOCK:
        k = load_rows(k_ptr, k_stride, 0, S, D, BLOCK_S, BLOCK_D, ALIGN)
        v = load_rows(v_ptr, v_stride, 0, S, D, BLOCK_S, BLOCK_D, ALIGN)
        if ONES:
            v = tl.where(ones, 1.0, v).to(v.dtype)

    for first in range(tl.program_id(1) * BLOCK_L, L, tl.num_programs(1) * BLOCK_L):
        q = load_rows(q_ptr, q_stride, first, L, D, BLOCK_L, BLOCK_D, ALIGN)
        m = tl.full([BLOCK_L], -float("inf"), tl.float32)
        l = tl.zeros([BLOCK_L], tl.float32)
        acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
        for first_key in range(0, BLOCK_S if ONE_BLOCK else S, BLOCK_S):
            if not ONE_BLOCK:
                k = load_rows(k_ptr, k_stride, first_key, S, D, BLOCK_S, BLOCK_D, ALIGN)
                v = load_rows(v_ptr, v_stride, first_key, S, D, BLOCK_S, BLOCK_D, ALIGN)
                if ONES:
                    v = tl.where(ones, 1.0, v).to(v.dtype)
            s = masked_scores(
                q, k, b, h, first, first_key, L, S, scale2, mask_ptr, mask_stride,
                bias_ptr, bias_stride, BLOCK_L, BLOCK_S, WHOLE, PRECISION,
            )  # fmt: skip
            m_new = tl.maximum(m, tl.max(s, 1))
            # a row without keys so far: any finite shift gives exp2(-inf) = 0
            shift = tl.where(m_new == -float("inf"), 0.0, m_new) * factor
            p = tl.exp2(s * factor - shift[:, None])
            shrink = tl.exp2(m * factor - shift)
            if not ONES:
                l = l * shrink + tl.sum(p, 1)
            if seed_ptr is not None:
                keep = keep_mask(seed_ptr, bh, first, first_key, threshold, BLOCK_L, BLOCK_S)
                p = tl.where(keep, p, 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            m = m_new
        if ONES:
            l = tl.sum(tl.where(ones, acc, 0.0), 1)
        # the largest weight is 1, so that l = 0 means a row without keys
        divisor = tl.where(l == 0.0, 1.0, l)
        lse = tl.where(l == 0.0, -float("inf"), (m * factor + tl.log2(divisor)) * LN2)
        i = first + tl.arange(0, BLOCK_L)
        tl.store(lse_ptr + i, lse, mask=i < L)
        o = acc * (gain / divisor)[:, None]
        store_rows(o_ptr, o_stride, first, L, o, D, BLOCK_L, BLOCK_D, ALIGN)
