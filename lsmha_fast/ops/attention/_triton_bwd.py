"""Backward kernels of attention: one program per head, no atomics, and one for the bias."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_fwd import LOG2E, head_of, keep_mask, load_rows, masked_scores, store_rows


@triton.jit
def score_grads(q, k, v, do, o, b, h, bh, first, first_key, L, S, scale2, mask_ptr, mask_stride,
                bias_ptr, bias_stride, lse_ptr, seed_ptr, threshold, gain,
                BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, WHOLE: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Weights after dropout, without its factor, and the gradient of the logits."""
    # rows past the end have q = do = 0 and so add nothing, whatever their weights
    i = first + tl.arange(0, BLOCK_L)
    lse = tl.load(lse_ptr + bh.to(tl.int64) * L + i, mask=i < L, other=0.0) * LOG2E
    lse = tl.where(lse == -float("inf"), 0.0, lse)
    s = masked_scores(q, k, b, h, first, first_key, L, S, scale2, mask_ptr, mask_stride,
                      bias_ptr, bias_stride, BLOCK_L, BLOCK_S, WHOLE, PRECISION)  # fmt: skip
    factor = scale2 if bias_ptr is None else 1.0
    p = tl.exp2(s * factor - lse[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION) * gain
    # o holds dropout and the head's scale, so this is rowsum(p dp)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    kept = p
    if seed_ptr is not None:
        keep = keep_mask(seed_ptr, bh, first, first_key, threshold, BLOCK_L, BLOCK_S)
        kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp, 0.0)
    return kept, p * (dp - delta[:, None])


@triton.jit
def _attention_bwd(
    q_ptr, q_stride, k_ptr, k_stride, v_ptr, v_stride, mask_ptr, mask_stride, bias_ptr, bias_stride,
    head_scale_ptr, seed_ptr, o_ptr, o_stride, lse_ptr, do_ptr, do_stride,
    dq_ptr, dq_stride, dk_ptr, dk_stride, dv_ptr, dv_stride, sum_ptr, sum_stride, dhead_scale_ptr,
    H, L, S, scale, scale2, threshold, keep_factor,
    D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, ONE_BLOCK: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one head. With several key blocks dq passes through fp32 scratch, which
    this program alone reads and writes: the sum has a fixed order."""
    bh = tl.program_id(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    q_ptr = head_of(q_ptr, q_stride, b, h, ALIGN)
    k_ptr = head_of(k_ptr, k_stride, b, h, ALIGN)
    v_ptr = head_of(v_ptr, v_stride, b, h, ALIGN)
    o_ptr = head_of(o_ptr, o_stride, b, h, ALIGN)
    do_ptr = head_of(do_ptr, do_stride, b, h, ALIGN)
    dq_ptr = head_of(dq_ptr, dq_stride, b, h, ALIGN)
    dk_ptr = head_of(dk_ptr, dk_stride, b, h, ALIGN)
    dv_ptr = head_of(dv_ptr, dv_stride, b, h, ALIGN)
    if not ONE_BLOCK:
        sum_ptr = head_of(sum_ptr, sum_stride, b, h, ALIGN)
    head_scale = 1.0 if head_scale_ptr is None else tl.load(head_scale_ptr + h).to(tl.float32)
    gain = head_scale * keep_factor
    dhead_scale = 0.0

    for first_key in range(0, BLOCK_S if ONE_BLOCK else S, BLOCK_S):
        k = load_rows(k_ptr, k_stride, first_key, S, D, BLOCK_S, BLOCK_D, ALIGN)
        v = load_rows(v_ptr, v_stride, first_key, S, D, BLOCK_S, BLOCK_D, ALIGN)
        dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        for first in range(0, L, BLOCK_L):
            q = load_rows(q_ptr, q_stride, first, L, D, BLOCK_L, BLOCK_D, ALIGN)
            do = load_rows(do_ptr, do_stride, first, L, D, BLOCK_L, BLOCK_D, ALIGN)
            o = load_rows(o_ptr, o_stride, first, L, D, BLOCK_L, BLOCK_D, ALIGN)
            kept, ds = score_grads(q, k, v, do, o, b, h, bh, first, first_key, L, S, scale2,
                                   mask_ptr, mask_stride, bias_ptr, bias_stride, lse_ptr, seed_ptr,
                                   threshold, gain, BLOCK_L, BLOCK_S, WHOLE, PRECISION)  # fmt: skip
            ds = ds.to(k.dtype)
            dv = tl.dot(tl.trans(kept.to(do.dtype)), do, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
            dq = tl.dot(ds, k, input_precision=PRECISION)
            if ONE_BLOCK:
                store_rows(dq_ptr, dq_stride, first, L, dq * scale, D, BLOCK_L, BLOCK_D, ALIGN)
            else:
                if first_key > 0:
                    dq += load_rows(sum_ptr, sum_stride, first, L, D, BLOCK_L, BLOCK_D, ALIGN)
                if first_key + BLOCK_S < S:
                    store_rows(sum_ptr, sum_stride, first, L, dq, D, BLOCK_L, BLOCK_D, ALIGN)
                else:
                    store_rows(dq_ptr, dq_stride, first, L, dq * scale, D, BLOCK_L, BLOCK_D, ALIGN)
        store_rows(dk_ptr, dk_stride, first_key, S, dk * scale, D, BLOCK_S, BLOCK_D, ALIGN)
        store_rows(dv_ptr, dv_stride, first_key, S, dv * gain, D, BLOCK_S, BLOCK_D, ALIGN)
        if head_scale_ptr is not None:
            # sum_ij p_ij do_i.v_j: right also when the head's scale, and so o, is zero
            dhead_scale += tl.sum(dv * v.to(tl.float32)) * keep_factor
        if not ONE_BLOCK:
            # the scratch of this pass must be visible to the other threads in the next
            tl.debug_barrier()
    if head_scale_ptr is not None:
        tl.store(dhead_scale_ptr + bh, dhead_scale)


@triton.jit
def _attention_bwd_bias(
    q_ptr, q_stride, k_ptr, k_stride, v_ptr, v_stride, mask_ptr, mask_stride, bias_ptr, bias_stride,
    head_scale_ptr, seed_ptr, o_ptr, o_stride, lse_ptr, do_ptr, do_stride, part_ptr,
    B, H, L, S, scale2, threshold, keep_factor, OVER_B: tl.constexpr, OVER_H: tl.constexpr,
    OVER_L: tl.constexpr, OVER_S: tl.constexpr,
    D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of the bias: the sum of the logits' gradients over whatever dimensions
    the bias broadcasts along, in a fixed order; program_id(2) shares the sum out in parts."""
    tiles_l, tiles_s = tl.cdiv(L, BLOCK_L), tl.cdiv(S, BLOCK_S)
    # number of terms along each dimension that is summed over; the program fixes the others
    terms_b, terms_h = B if OVER_B else 1, H if OVER_H else 1
    terms_l, terms_s = tiles_l if OVER_L else 1, tiles_s if OVER_S else 1
    own_h, own_s = 1 if OVER_H else H, 1 if OVER_S else tiles_s
    tile, image = tl.program_id(0), tl.program_id(1)
    acc = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
    for term in range(tl.program_id(2), terms_b * terms_h * terms_l * terms_s, tl.num_programs(2)):
        first_key = (tile % own_s + term % terms_s) * BLOCK_S
        first = (tile // own_s + term // terms_s % terms_l) * BLOCK_L
        head = image % own_h + term // (terms_s * terms_l) % terms_h
        bh = (image // own_h + term // (terms_s * terms_l * terms_h)) * H + head
        b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
        q = load_rows(head_of(q_ptr, q_stride, b, h, ALIGN), q_stride, first, L, D,
                      BLOCK_L, BLOCK_D, ALIGN)  # fmt: skip
        k = load_rows(head_of(k_ptr, k_stride, b, h, ALIGN), k_stride, first_key, S, D,
                      BLOCK_S, BLOCK_D, ALIGN)  # fmt: skip
        v = load_rows(head_of(v_ptr, v_stride, b, h, ALIGN), v_stride, first_key, S, D,
                      BLOCK_S, BLOCK_D, ALIGN)  # fmt: skip
        do = load_rows(head_of(do_ptr, do_stride, b, h, ALIGN), do_stride, first, L, D,
                       BLOCK_L, BLOCK_D, ALIGN)  # fmt: skip
        o = load_rows(head_of(o_ptr, o_stride, b, h, ALIGN), o_stride, first, L, D,
                      BLOCK_L, BLOCK_D, ALIGN)  # fmt: skip
        gain = keep_factor
        if head_scale_ptr is not None:
            gain *= tl.load(head_scale_ptr + h).to(tl.float32)
        _, ds = score_grads(q, k, v, do, o, b, h, bh, first, first_key, L, S, scale2,
                            mask_ptr, mask_stride, bias_ptr, bias_stride, lse_ptr, seed_ptr,
                            threshold, gain, BLOCK_L, BLOCK_S, WHOLE, PRECISION)  # fmt: skip
        acc += ds

    # part_ptr is (parts, rows of the bias, columns of the bias) with its B and H in the rows
    rows, columns = 1 if OVER_L else L, 1 if OVER_S else S
    i = tile // own_s * BLOCK_L + tl.arange(0, BLOCK_L)
    j = tile % own_s * BLOCK_S + tl.arange(0, BLOCK_S)
    if OVER_L:
        acc, i = tl.sum(acc, 0, keep_dims=True), tl.arange(0, 1)
    if OVER_S:
        acc, j = tl.sum(acc, 1, keep_dims=True), tl.arange(0, 1)
    base = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + image) * rows * columns
    offset = i.to(tl.int64)[:, None] * columns + j[None, :]
    tl.store(part_ptr + base + offset, acc, mask=(i < rows)[:, None] & (j < columns)[None, :])
