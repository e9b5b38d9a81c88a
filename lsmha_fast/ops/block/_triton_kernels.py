"""Triton kernels of a block's linear maps: a program keeps whole rows and passes weights by.

A tile of rows is a tuple of pieces [BLOCK_M, PIECE], so that 384 channels are 3 pieces of 128 and
no product is padded to 512. Weights are (out, in) as in `torch.nn.Linear`, so that both operands
of a product are contiguous in its inner dimension. Products sum in fp32; what enters the next
product is rounded to the dtype of the tokens, as in plain PyTorch. No sum crosses programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

# of two parts of each number, the product of the small ones left out: tensor cores, fp32's accuracy
FP32_PRODUCTS = tl.constexpr("tf32x3")


@triton.jit
def load_rows(ptr, first, M, C: tl.constexpr, BLOCK_M: tl.constexpr, PIECE: tl.constexpr):
    """Rows first.. of a dense (M, C) matrix as a tuple of [BLOCK_M, PIECE]; zeros outside."""
    ptr += tl.cast(first, tl.int64) * C
    m, c = tl.arange(0, BLOCK_M), tl.arange(0, PIECE)
    pieces = ()
    for start in tl.static_range(0, C, PIECE):
        mask = (m < M - first)[:, None] & (start + c < C)[None, :]
        x = tl.load(ptr + m[:, None] * C + (start + c)[None, :], mask=mask, other=0.0)
        # not unpacking, which Triton does not parse
        pieces = pieces + (x,)  # noqa: RUF005
    return pieces


@triton.jit
def store_rows(ptr, pieces, first, M, C: tl.constexpr, BLOCK_M: tl.constexpr, PIECE: tl.constexpr):
    """The reverse of `load_rows`, in the dtype of `ptr`."""
    ptr += tl.cast(first, tl.int64) * C
    m, c = tl.arange(0, BLOCK_M), tl.arange(0, PIECE)
    for start in tl.static_range(0, C, PIECE):
        mask = (m < M - first)[:, None] & (start + c < C)[None, :]
        x = pieces[start // PIECE].to(ptr.dtype.element_ty)
        tl.store(ptr + m[:, None] * C + (start + c)[None, :], x, mask=mask)


@triton.jit
def row_of(ptr, start, C, BLOCK: tl.constexpr):
    """Elements start.. of a vector of C as fp32 [1, BLOCK]; zeros outside, and without a vector."""
    c = start + tl.arange(0, BLOCK)
    if ptr is None:
        return tl.zeros([1, BLOCK], tl.float32)
    return tl.load(ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def normalise(pieces, weight_ptr, bias_ptr, eps, C: tl.constexpr, BLOCK_M: tl.constexpr,
              PIECE: tl.constexpr):  # fmt: skip
    """LayerNorm of every row in fp32, with two passes over the registers; affine where given."""
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.static_range(0, C, PIECE):
        total += tl.sum(pieces[start // PIECE].to(tl.float32), 1)
    mean = (total / C)[:, None]
    squares = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.static_range(0, C, PIECE):
        inside = (start + tl.arange(0, PIECE) < C)[None, :]
        d = tl.where(inside, pieces[start // PIECE].to(tl.float32) - mean, 0.0)
        squares += tl.sum(d * d, 1)
    factor = tl.rsqrt(squares / C + eps)[:, None]
    normal = ()
    for start in tl.static_range(0, C, PIECE):
        # channels past C meet zeros of the weights in every product, and are not stored
        y = (pieces[start // PIECE].to(tl.float32) - mean) * factor
        if weight_ptr is not None:
            y = y * row_of(weight_ptr, start, C, PIECE) + row_of(bias_ptr, start, C, PIECE)
        normal = normal + (y,)  # noqa: RUF005
    return normal


@triton.jit
def rounded(pieces, C: tl.constexpr, PIECE: tl.constexpr, dtype: tl.constexpr):
    """The pieces in the dtype of a product's operands."""
    low = ()
    for start in tl.static_range(0, C, PIECE):
        low = low + (pieces[start // PIECE].to(dtype),)  # noqa: RUF005
    return low


@triton.jit
def columns_of(weight_ptr, first, start, OUT: tl.constexpr, IN: tl.constexpr, BLOCK: tl.constexpr,
               PIECE: tl.constexpr):  # fmt: skip
    """Transposed tile [PIECE, BLOCK] of an (OUT, IN) weight; zeros outside."""
    o, i = first + tl.arange(0, BLOCK), start + tl.arange(0, PIECE)
    mask = (o < OUT)[:, None] & (i < IN)[None, :]
    return tl.trans(tl.load(weight_ptr + o[:, None] * IN + i[None, :], mask=mask, other=0.0))


@triton.jit
def product(acc, pieces, weight_ptr, first, OUT: tl.constexpr, IN: tl.constexpr,
            BLOCK: tl.constexpr, PIECE: tl.constexpr):  # fmt: skip
    """acc [BLOCK_M, BLOCK] plus rows times outputs first.. of the weight."""
    for start in tl.static_range(0, IN, PIECE):
        w = columns_of(weight_ptr, first, start, OUT, IN, BLOCK, PIECE)
        acc = tl.dot(pieces[start // PIECE], w, acc, input_precision=FP32_PRODUCTS)
    return acc


@triton.jit
def gelu(x):
    """The GELU of the error function: max(x, 0) - |x| Phi(-|x|), in which nothing cancels.

    Phi(-|x|) is formula 7.1.26 of Abramowitz and Stegun, within 0.75e-7. It takes less than
    half of the instructions of `tl.erf`, which would outlast the tensor cores in the MLP's loop.
    """
    a = tl.abs(x)
    root = tl.rsqrt(1.0 + 0.2316418883 * a)  # squared: a division takes 6 instructions more
    t = root * root
    tail = -0.7265760135 + t * 0.5307027145
    tail = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * tail))
    return tl.maximum(x, 0.0) - a * t * tail * tl.exp2(a * a * -0.7213475204)


@triton.jit
def project(heads_ptr, residual_ptr, weight_ptr, bias_ptr, first, M, C: tl.constexpr,
            IN: tl.constexpr, BLOCK_M: tl.constexpr, PIECE: tl.constexpr,
            DEPTH: tl.constexpr):  # fmt: skip
    """heads W^T + bias + residual of a tile of rows, fp32; the weight streams by in its depth."""
    m, i = tl.arange(0, BLOCK_M), tl.arange(0, DEPTH)
    heads_ptr += tl.cast(first, tl.int64) * IN
    pieces = ()
    for start in tl.static_range(0, C, PIECE):
        acc = tl.zeros([BLOCK_M, PIECE], tl.float32) + row_of(bias_ptr, start, C, PIECE)
        pieces = pieces + (acc,)  # noqa: RUF005
    for depth in range(0, IN, DEPTH):
        mask = (m < M - first)[:, None] & (depth + i < IN)[None, :]
        heads = tl.load(heads_ptr + m[:, None] * IN + (depth + i)[None, :], mask=mask, other=0.0)
        added = ()
        for start in tl.static_range(0, C, PIECE):
            w = columns_of(weight_ptr, start, depth, C, IN, PIECE, DEPTH)
            acc = tl.dot(heads, w, pieces[start // PIECE], input_precision=FP32_PRODUCTS)
            added = added + (acc,)  # noqa: RUF005
        pieces = added
    residual = load_rows(residual_ptr, first, M, C, BLOCK_M, PIECE)
    stream = ()
    for start in tl.static_range(0, C, PIECE):
        x = pieces[start // PIECE] + residual[start // PIECE].to(tl.float32)
        stream = stream + (x,)  # noqa: RUF005
    return stream


@triton.jit
def store_columns(ptr, x, first, column, M, OUT: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Write [BLOCK_M, BLOCK] at (first, column) of a dense (M, OUT) matrix."""
    ptr += tl.cast(first, tl.int64) * OUT
    m, o = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK)
    mask = (m < M - first)[:, None] & (o < OUT)[None, :]
    tl.store(ptr + m[:, None] * OUT + o[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_linear(
    x_ptr, weight_ptr, bias_ptr, out_ptr, M, eps,
    C: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """LayerNorm, product, bias. program_id(1) shares the outputs out; the rows are read once."""
    first = tl.program_id(0) * BLOCK_M
    x = load_rows(x_ptr, first, M, C, BLOCK_M, PIECE)
    x = normalise(x, None, None, eps, C, BLOCK_M, PIECE)
    x = rounded(x, C, PIECE, x_ptr.dtype.element_ty)
    for column in range(tl.program_id(1) * BLOCK_O, OUT, tl.num_programs(1) * BLOCK_O):
        acc = tl.zeros([BLOCK_M, BLOCK_O], tl.float32) + row_of(bias_ptr, column, OUT, BLOCK_O)
        acc = product(acc, x, weight_ptr, column, OUT, C, BLOCK_O, PIECE)
        store_columns(out_ptr, acc, first, column, M, OUT, BLOCK_M, BLOCK_O)


@triton.jit
def _project_fc1(
    heads_ptr, residual_ptr, proj_weight_ptr, proj_bias_ptr, norm_weight_ptr, norm_bias_ptr,
    weight_ptr, bias_ptr, stream_ptr, hidden_ptr, M, eps,
    C: tl.constexpr, IN: tl.constexpr, HIDDEN: tl.constexpr, NORMED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, PIECE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Projection, residual, LayerNorm, first product of the MLP, GELU, for few rows.

    The programs of one tile of rows share the hidden units out and each project the rows anew.
    """
    first = tl.program_id(0) * BLOCK_M
    stream = project(
        heads_ptr, residual_ptr, proj_weight_ptr, proj_bias_ptr, first, M, C, IN, BLOCK_M, PIECE,
        DEPTH,
    )  # fmt: skip
    normal = normalise(stream, norm_weight_ptr, norm_bias_ptr, eps, C, BLOCK_M, PIECE)
    if NORMED:
        stream = normal
    if tl.program_id(1) == 0:
        store_rows(stream_ptr, stream, first, M, C, BLOCK_M, PIECE)
    low = rounded(normal, C, PIECE, heads_ptr.dtype.element_ty)
    for unit in range(tl.program_id(1) * BLOCK_H, HIDDEN, tl.num_programs(1) * BLOCK_H):
        acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32) + row_of(bias_ptr, unit, HIDDEN, BLOCK_H)
        acc = product(acc, low, weight_ptr, unit, HIDDEN, C, BLOCK_H, PIECE)
        store_columns(hidden_ptr, gelu(acc), first, unit, M, HIDDEN, BLOCK_M, BLOCK_H)


@triton.jit
def _fc2(
    hidden_ptr, weight_ptr, bias_ptr, stream_ptr, out_ptr, M,
    C: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Second product of the MLP, bias, residual, for few rows."""
    first, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_O
    m, o = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_O)
    i = tl.arange(0, DEPTH)
    rows = (m < M - first)[:, None]
    hidden_ptr += tl.cast(first, tl.int64) * HIDDEN
    stream_ptr += tl.cast(first, tl.int64) * C
    stream = tl.load(
        stream_ptr + m[:, None] * C + o[None, :], mask=rows & (o < C)[None, :], other=0.0
    )
    acc = tl.zeros([BLOCK_M, BLOCK_O], tl.float32) + row_of(bias_ptr, column, C, BLOCK_O)
    for start in range(0, HIDDEN, DEPTH):
        units = start + i
        mask = rows & (units < HIDDEN)[None, :]
        h = tl.load(hidden_ptr + m[:, None] * HIDDEN + units[None, :], mask=mask, other=0.0)
        w = columns_of(weight_ptr, column, start, C, HIDDEN, BLOCK_O, DEPTH)
        acc = tl.dot(h, w, acc, input_precision=FP32_PRODUCTS)
    acc += stream.to(tl.float32)
    store_columns(out_ptr, acc, first, column, M, C, BLOCK_M, BLOCK_O)


@triton.jit
def _project_mlp(
    heads_ptr, residual_ptr, proj_weight_ptr, proj_bias_ptr, norm_weight_ptr, norm_bias_ptr,
    fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, out_ptr, M, eps,
    C: tl.constexpr, IN: tl.constexpr, HIDDEN: tl.constexpr, NORMED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, PIECE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Everything of a block behind attention, for many rows; hidden units never leave the SM."""
    first = tl.program_id(0) * BLOCK_M
    dtype: tl.constexpr = heads_ptr.dtype.element_ty
    stream = project(
        heads_ptr, residual_ptr, proj_weight_ptr, proj_bias_ptr, first, M, C, IN, BLOCK_M, PIECE,
        DEPTH,
    )  # fmt: skip
    normal = normalise(stream, norm_weight_ptr, norm_bias_ptr, eps, C, BLOCK_M, PIECE)
    # the residual waits in the output's memory: beside the sums there is no room in registers
    store_rows(out_ptr, normal if NORMED else stream, first, M, C, BLOCK_M, PIECE)
    low = rounded(normal, C, PIECE, dtype)
    out = ()
    for start in tl.static_range(0, C, PIECE):
        acc = tl.zeros([BLOCK_M, PIECE], tl.float32) + row_of(fc2_bias_ptr, start, C, PIECE)
        out = out + (acc,)  # noqa: RUF005
    for unit in range(0, HIDDEN, BLOCK_H):
        acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32) + row_of(fc1_bias_ptr, unit, HIDDEN, BLOCK_H)
        acc = product(acc, low, fc1_weight_ptr, unit, HIDDEN, C, BLOCK_H, PIECE)
        h = gelu(acc).to(dtype)
        added = ()
        for start in tl.static_range(0, C, PIECE):
            w = columns_of(fc2_weight_ptr, start, unit, C, HIDDEN, PIECE, BLOCK_H)
            acc = tl.dot(h, w, out[start // PIECE], input_precision=FP32_PRODUCTS)
            added = added + (acc,)  # noqa: RUF005
        out = added
    tl.debug_barrier()
    stream = load_rows(out_ptr, first, M, C, BLOCK_M, PIECE)
    added = ()
    for start in tl.static_range(0, C, PIECE):
        x = out[start // PIECE] + stream[start // PIECE].to(tl.float32)
        added = added + (x,)  # noqa: RUF005
    store_rows(out_ptr, added, first, M, C, BLOCK_M, PIECE)


@triton.jit
def _norm_pool_linear(
    x_ptr, score_ptr, weight_ptr, bias_ptr, out_ptr, N, K, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LayerNorm, softmax-weighted mean of the tokens, product, bias: one image per program."""
    b = tl.program_id(0).to(tl.int64)
    n, k, c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C)
    inside = (c < C)[None, :]
    x_ptr += b * N * C
    out_ptr += b * K
    score = row_of(score_ptr, 0, C, BLOCK_C)
    top = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    pooled = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, N, BLOCK_N):
        valid = first + n < N
        x = tl.load(x_ptr + n[:, None] * C + c[None, :], mask=valid[:, None] & inside, other=0.0)
        x = x.to(tl.float32)
        d = tl.where(inside, x - (tl.sum(x, 1) / C)[:, None], 0.0)
        y = d * tl.rsqrt(tl.sum(d * d, 1) / C + eps)[:, None]
        s = tl.where(valid, tl.sum(y * score, 1), -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 0, keep_dims=True))
        keep, e = tl.exp(top - new_top), tl.exp(s - new_top)
        total = total * keep + tl.sum(e, 0, keep_dims=True)
        pooled = pooled * keep + tl.sum(e[:, None] * y, 0)
        top = new_top
        x_ptr += BLOCK_N * C
    pooled = (pooled / total)[None, :]
    for first in range(0, K, BLOCK_K):
        o = first + k
        mask = (o < K)[:, None] & inside
        w = tl.load(weight_ptr + o[:, None] * C + c[None, :], mask=mask, other=0.0)
        logits = tl.sum(w.to(tl.float32) * pooled, 1)
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + o, mask=o < K, other=0.0).to(tl.float32)
        tl.store(out_ptr + o, logits, mask=o < K)
