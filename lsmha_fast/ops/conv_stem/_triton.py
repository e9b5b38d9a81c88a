"""The conv stem in Triton: pooled tokens straight from the image, and the gradients.

Forward: a program owns BLOCK_M pooled columns (image, column), walks down the pooled rows and
keeps running maxima of convolution sums, so nothing of the convolution's resolution reaches
memory. The last row of a window is the first of the next one and is carried over; only columns
shared by neighbouring windows are summed twice. For the 3x3/2 pooling this makes
1.5 (1 + 1 / STRIP) times the sums of the plain convolution, against 2.25 without the carry.
Bias and ReLU follow the maximum, on a quarter of the values. Where all of a row step's sums read
one small patch (3x3 filters on colours: 4 x 5 x 3 = 60 values), the patch is fetched once, WIDE,
and multiplied by filters moved within it: more multiplications, but a third of the loads, whose
addresses would otherwise be most of the instructions.

Backward: every window sends its gradient to the position that its code names, so the gradient of
the weight is, per position in the window, a product of masked `do` with the patches there: each
`do` and code is read once and nothing is scattered. A one after the last tap of a patch makes the
bias one more filter value. Partial sums per program are added by torch.sum: no atomics. With an
image gradient wanted, the gradient `dy` of the convolution sums is gathered into memory once and
dx is the forward kernel on it, with mirrored filters: deterministic and exact in fp32 without
touching cuDNN's global flags. A stride of s makes dx multiply s * s times more zeros than needed;
tokenizers convolve later layers with stride 1 or 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_utils import next_pow2
from .common import window_count

# programs that fill 132 multiprocessors four times
PROGRAMS = 528


@triton.jit
def _patches(
    x_ptr, x_stride, b, oy, ox, k, H, W,
    CIN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Image values from the corner of the filter at (oy, ox) on: [BLOCK_M, BLOCK_K].

    k counts channels, then COLS columns, then ROWS rows; the value after the last is a one, the
    bias's. UP spreads the image by zeros: the transposed convolution reads dy so.
    """
    ci = k % CIN
    ky = k // CIN // COLS
    kx = k // CIN % COLS
    y0 = oy * STRIDE - PADDING
    x0 = ox * STRIDE - PADDING  # [BLOCK_M]
    iy = y0 + ky  # [BLOCK_K]
    ix = x0[:, None] + kx[None, :]  # [BLOCK_M, BLOCK_K]
    # unsigned, so that one comparison covers both ends
    inside = (k < CIN * ROWS * COLS) & (iy.to(tl.uint32) < H * UP)
    inside = inside[None, :] & (ix.to(tl.uint32) < W * UP)
    image = x_ptr + b * x_stride[0]  # [BLOCK_M]
    if UP == 1:
        # a sum of what depends on the position and what depends on the tap: one addition each
        position = image + (y0 * x_stride[2] + x0 * x_stride[3])
        ptrs = position[:, None] + (ci * x_stride[1] + ky * x_stride[2] + kx * x_stride[3])[None, :]
    else:
        inside = inside & (iy % UP == 0)[None, :] & (ix % UP == 0)
        from_k = ci * x_stride[1] + iy // UP * x_stride[2]
        ptrs = image[:, None] + from_k[None, :] + ix // UP * x_stride[3]
    return tl.load(ptrs, mask=inside, other=tl.where(k == CIN * ROWS * COLS, 1.0, 0.0)[None, :])


@triton.jit
def _filters(
    weight_ptr, weight_stride, k, c, C, dy, dx,
    CIN: tl.constexpr, KERNEL: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Filters moved by (dy, dx) within the patch, zero around them: [BLOCK_K, BLOCK_C]."""
    ky = k // CIN // COLS - dy
    kx = k // CIN % COLS - dx
    inside = (ky >= 0) & (ky < KERNEL) & (kx >= 0) & (kx < KERNEL)
    from_k = (k % CIN) * weight_stride[1] + ky * weight_stride[2] + kx * weight_stride[3]
    ptrs = weight_ptr + from_k[:, None] + (c * weight_stride[0])[None, :]
    return tl.load(ptrs, mask=inside[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _first_max(best, code, value, value_code):
    """The larger value and its code, the earlier one among equals; NaN wins, as in PyTorch."""
    code = tl.where(value > best, value_code, code)
    return tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL), code


@triton.jit
def _chunked_sums(
    x_ptr, x_stride, weight_ptr, weight_stride, b, oy, ox, c, H, W, C,
    CIN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    UP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Convolution sums at (oy, ox): [BLOCK_M, BLOCK_C]."""
    sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for k0 in range(0, CIN * KERNEL * KERNEL, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        patches = _patches(
            x_ptr, x_stride, b, oy, ox, k, H, W, CIN, KERNEL, KERNEL, STRIDE, PADDING, UP
        )
        filters = _filters(weight_ptr, weight_stride, k, c, C, 0, 0, CIN, KERNEL, KERNEL)
        sums = tl.dot(patches, filters, sums, input_precision="ieee")
    return sums


@triton.jit
def _conv_stem_fwd(
    x_ptr, x_stride, weight_ptr, weight_stride, bias_ptr, out_ptr, codes_ptr,
    B, C, H, W, HC, WC, HO, WO, STRIP,
    CIN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    UP: tl.constexpr, POOL_KERNEL: tl.constexpr, POOL_STRIDE: tl.constexpr,
    POOL_PADDING: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # rows of a window that the window above has not summed already
    CARRY: tl.constexpr = 1 if POOL_KERNEL - POOL_STRIDE == 1 else 0
    NEW: tl.constexpr = POOL_KERNEL - CARRY
    ROWS: tl.constexpr = (NEW - 1) * STRIDE + KERNEL
    COLS: tl.constexpr = (POOL_KERNEL - 1) * STRIDE + KERNEL
    column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    first = tl.program_id(2) * STRIP
    # columns past the last one repeat it and are not stored
    valid = column < B * WO
    column = tl.minimum(column, B * WO - 1)
    b = (column // WO).to(tl.int64)
    px = column % WO
    if WIDE:
        filters = ()
        for i in tl.static_range(NEW * POOL_KERNEL):
            moved = _filters(
                weight_ptr, weight_stride, k, c, C, i // POOL_KERNEL * STRIDE,
                i % POOL_KERNEL * STRIDE, CIN, KERNEL, COLS,
            )  # fmt: skip
            # not unpacking, which Triton does not parse
            filters = filters + (moved,)  # noqa: RUF005

    row = tl.full([BLOCK_M, BLOCK_C], -float("inf"), tl.float32)
    row_code = tl.zeros([BLOCK_M, BLOCK_C], tl.int32)
    # with a row to carry, a first turn only sums the row above the first window
    for py in range(first - CARRY, tl.minimum(first + STRIP, HO)):
        best = tl.full([BLOCK_M, BLOCK_C], -float("inf"), tl.float32)
        code = tl.zeros([BLOCK_M, BLOCK_C], tl.int32)
        if CARRY == 1:
            best, code = row, row_code
        oy = py * POOL_STRIDE - POOL_PADDING + CARRY
        if WIDE:
            patches = _patches(
                x_ptr, x_stride, b, oy, px * POOL_STRIDE - POOL_PADDING, k, H, W,
                CIN, ROWS, COLS, STRIDE, PADDING, UP,
            )  # fmt: skip
        for ky in tl.static_range(NEW):
            row = tl.full([BLOCK_M, BLOCK_C], -float("inf"), tl.float32)
            row_code = tl.zeros([BLOCK_M, BLOCK_C], tl.int32)
            for kx in tl.static_range(POOL_KERNEL):
                ox = px * POOL_STRIDE - POOL_PADDING + kx
                if WIDE:
                    sums = tl.dot(patches, filters[ky * POOL_KERNEL + kx])
                else:
                    sums = _chunked_sums(
                        x_ptr, x_stride, weight_ptr, weight_stride, b, oy + ky, ox, c, H, W, C,
                        CIN, KERNEL, STRIDE, PADDING, UP, BLOCK_M, BLOCK_C, BLOCK_K,
                    )  # fmt: skip
                # windows leave the plane by their first or last POOL_PADDING positions only
                if kx < POOL_PADDING or kx >= POOL_KERNEL - POOL_PADDING:
                    sums = tl.where(((ox >= 0) & (ox < WC))[:, None], sums, -float("inf"))
                row, row_code = _first_max(row, row_code, sums, kx)
            row = tl.where((oy + ky >= 0) & (oy + ky < HC), row, -float("inf"))
            best, code = _first_max(best, code, row, row_code + (ky + CARRY) * POOL_KERNEL)

        if bias_ptr is not None:
            best += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        if RELU:
            zero = best <= 0
            best = tl.where(zero, 0.0, best)
            code = tl.where(zero, POOL_KERNEL * POOL_KERNEL, code)
        mask = (valid & (py >= first))[:, None] & (c < C)[None, :]
        offset = ((b * HO + py) * WO + px)[:, None] * C + c[None, :]
        tl.store(out_ptr + offset, best, mask=mask)
        if codes_ptr is not None:
            tl.store(codes_ptr + offset, code, mask=mask)


@triton.jit
def _conv_stem_bwd_dy(
    do_ptr, do_stride, codes_ptr, dy_ptr, B, C, HC, WC, HO, WO,
    POOL_KERNEL: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of the convolution sums, each gathered from the windows that contain it."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = m // (HC * WC)
    y = (m // WC % HC).to(tl.int32) + POOL_PADDING
    x = (m % WC).to(tl.int32) + POOL_PADDING
    mask = (m < B * HC * WC)[:, None] & (c < C)[None, :]

    dy = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    WINDOWS: tl.constexpr = (POOL_KERNEL + POOL_STRIDE - 1) // POOL_STRIDE
    for i in tl.static_range(WINDOWS * WINDOWS):
        # the last window that starts at or before the position, and those before it
        py = y // POOL_STRIDE - i // WINDOWS
        px = x // POOL_STRIDE - i % WINDOWS
        ky = y - py * POOL_STRIDE
        kx = x - px * POOL_STRIDE
        inside = (py >= 0) & (py < HO) & (px >= 0) & (px < WO)
        inside = (inside & (ky < POOL_KERNEL) & (kx < POOL_KERNEL))[:, None] & mask
        n = py * WO + px
        code = tl.load(codes_ptr + (b * HO * WO + n)[:, None] * C + c[None, :], inside, other=255)
        chosen = inside & (code == (ky * POOL_KERNEL + kx)[:, None])
        window = b * do_stride[0] + n * do_stride[1]
        ptrs = do_ptr + window[:, None] + (c * do_stride[2])[None, :]
        dy += tl.load(ptrs, mask=chosen, other=0.0).to(tl.float32)
    tl.store(dy_ptr + m[:, None] * C + c[None, :], dy, mask=mask)


@triton.jit
def _conv_stem_bwd_dweight(
    do_ptr, do_stride, codes_ptr, x_ptr, x_stride, partial_ptr,
    B, C, H, W, HO, WO, STRIP,
    CIN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    POOL_KERNEL: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over one share of the windows: (shares, C, K + 1), dweight and then dbias.

    Without codes `do` is the gradient of the convolution sums themselves (POOL_KERNEL = 1).
    """
    COLUMNS: tl.constexpr = CIN * KERNEL * KERNEL + 1
    share = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    strips = tl.cdiv(HO, STRIP)
    sums = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)

    for item in range(share, tl.cdiv(B * WO, BLOCK_M) * strips, tl.num_programs(0)):
        column = (item // strips) * BLOCK_M + tl.arange(0, BLOCK_M)
        first = (item % strips) * STRIP
        # columns past the last one repeat it with a gradient of zero
        valid = column < B * WO
        column = tl.minimum(column, B * WO - 1)
        b = (column // WO).to(tl.int64)
        px = column % WO
        mask = valid[:, None] & (c < C)[None, :]
        for py in range(first, tl.minimum(first + STRIP, HO)):
            window = b * do_stride[0] + (py * WO + px) * do_stride[1]
            ptrs = do_ptr + window[:, None] + (c * do_stride[2])[None, :]
            do = tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_C]
            if codes_ptr is not None:
                token = (b * HO + py) * WO + px
                code = tl.load(codes_ptr + token[:, None] * C + c[None, :], mask=mask, other=255)
            for i in range(POOL_KERNEL * POOL_KERNEL):
                oy = py * POOL_STRIDE - POOL_PADDING + i // POOL_KERNEL
                ox = px * POOL_STRIDE - POOL_PADDING + i % POOL_KERNEL
                patches = _patches(
                    x_ptr, x_stride, b, oy, ox, k, H, W, CIN, KERNEL, KERNEL, STRIDE, PADDING, 1
                )
                dy = do
                if codes_ptr is not None:
                    dy = tl.where(code == i, do, 0.0)
                sums = tl.dot(tl.trans(dy), patches, sums, input_precision="ieee")

    ptrs = partial_ptr + (share * C + c)[:, None].to(tl.int64) * COLUMNS + k[None, :]
    tl.store(ptrs, sums, mask=(c < C)[:, None] & (k < COLUMNS)[None, :])


def _forward_blocks(C: int, CIN: int, dtype: torch.dtype, geometry: dict) -> dict:
    """Block sizes: what compiles for sm_90 without spills (test_conv_stem_aot.py), not timed."""
    kernel, stride, side = (geometry[n] for n in ("KERNEL", "STRIDE", "POOL_KERNEL"))
    # rows and columns of the window that one step sums, and the patch below them
    new_rows = side - (side - geometry["POOL_STRIDE"] == 1)
    depth = CIN * ((new_rows - 1) * stride + kernel) * ((side - 1) * stride + kernel)
    half = dtype != torch.float32
    wide = half and depth <= 64 and new_rows * side <= 6
    deepest = 64 if half else 16
    return {
        "WIDE": wide,
        "BLOCK_M": 64,
        "BLOCK_C": min(_tile(C), 64 if half else 32),
        "BLOCK_K": min(_tile(depth if wide else CIN * kernel * kernel), deepest),
        "num_warps": 8,
        "num_stages": 2,
    }


def _weight_blocks(C: int, columns: int, dtype: torch.dtype) -> dict:
    """Block sizes for the gradient of the weight, found in the same way."""
    half = dtype != torch.float32
    return {
        "BLOCK_M": 64 if half else 32,
        "BLOCK_C": min(_tile(C), 128 if half else 64),
        "BLOCK_K": min(_tile(columns), 64 if half else 32),
        "num_warps": 8,
        "num_stages": 2,
    }


def _tile(n: int) -> int:
    """The smallest block that holds n; tensor cores want at least 16."""
    return max(next_pow2(n), 16)


def _rows_per_program(rows: int, programs: int) -> int:
    """How many rows one program walks so that all of them still fill the GPU."""
    strips = min(max(PROGRAMS // max(programs, 1), 1), rows)
    return triton.cdiv(rows, strips)


def _geometry(kernel, stride, padding, pool):
    names = ("KERNEL", "STRIDE", "PADDING", "POOL_KERNEL", "POOL_STRIDE", "POOL_PADDING")
    return dict(zip(names, (kernel, stride, padding, *pool), strict=True))


def _launch_forward(x, weight, bias, out, codes, conv_size, size, relu, up, geometry):
    B, CIN, H, W = x.shape
    C = len(weight)
    blocks = _forward_blocks(C, CIN, x.dtype, geometry)
    if not blocks["WIDE"]:
        # chunks of filters are read again and again: let them be contiguous
        weight = weight.contiguous(memory_format=torch.channels_last)
    columns = triton.cdiv(B * size[1], blocks["BLOCK_M"])
    channels = triton.cdiv(C, blocks["BLOCK_C"])
    strip = _rows_per_program(size[0], columns * channels)
    _conv_stem_fwd[columns, channels, triton.cdiv(size[0], strip)](
        x, x.stride(), weight, weight.stride(), bias, out, codes,
        B, C, H, W, *conv_size, *size, strip, CIN=CIN, UP=up, RELU=relu, **geometry, **blocks,
    )  # fmt: skip


def conv_stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    pool: list[int],
    need_codes: bool,
) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, C) and, where needed, the codes (B, N, C) that the gradient follows."""
    kernel = weight.shape[-1]
    conv_size = [window_count(n, kernel, stride, padding) for n in x.shape[2:]]
    size = [window_count(n, *pool) for n in conv_size]
    out = x.new_empty(len(x), size[0] * size[1], len(weight))
    codes = x.new_empty(out.shape if need_codes else (0,), dtype=torch.uint8)
    if out.numel() > 0:
        geometry = _geometry(kernel, stride, padding, pool)
        written = codes if need_codes else None
        _launch_forward(x, weight, bias, out, written, conv_size, size, True, 1, geometry)
    return out, codes


def conv_stem_backward(
    do: Tensor,
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    stride: int,
    padding: int,
    pool: list[int],
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of images (channels-last), weight and bias; those not needed are empty."""
    kernel = weight.shape[-1]
    conv_size = [window_count(n, kernel, stride, padding) for n in x.shape[2:]]
    dx, dweight, dbias = (x.new_empty(0) for _ in range(3))
    if need_dx:
        do = _conv_gradient(do, codes, len(weight), conv_size, pool)
        codes, pool = None, [1, 1, 0]
        dx = _image_gradient(do, x, weight, stride, padding, conv_size)
    if need_dweight:
        dweight, dbias = _weight_gradient(do, codes, x, weight, stride, padding, conv_size, pool)
    return dx, dweight, dbias


def _conv_gradient(do, codes, C, conv_size, pool):
    """dy (B, HC * WC, C), the gradient of the convolution sums."""
    size = [window_count(n, *pool) for n in conv_size]
    rows = len(do) * conv_size[0] * conv_size[1]
    dy = do.new_empty(len(do), conv_size[0] * conv_size[1], C)
    if rows > 0:
        kernel, stride, padding = pool
        block_c = min(_tile(C), 128)
        _conv_stem_bwd_dy[triton.cdiv(rows, 32), triton.cdiv(C, block_c)](
            do, do.stride(), codes, dy, len(do), C, *conv_size, *size,
            POOL_KERNEL=kernel, POOL_STRIDE=stride, POOL_PADDING=padding,
            BLOCK_M=32, BLOCK_C=block_c, num_warps=4, num_stages=2,
        )  # fmt: skip
    return dy


def _image_gradient(dy, x, weight, stride, padding, conv_size):
    """dx (B, Cin, H, W), channels-last: the transposed convolution of dy."""
    B, CIN, H, W = x.shape
    dx = x.new_empty(B, H, W, CIN)
    if dx.numel() > 0:
        image = dy.unflatten(1, conv_size).permute(0, 3, 1, 2)
        mirrored = weight.flip(2, 3).transpose(0, 1)
        kernel = weight.shape[-1]
        geometry = _geometry(kernel, 1, kernel - 1 - padding, [1, 1, 0])
        _launch_forward(image, mirrored, None, dx, None, (H, W), (H, W), False, stride, geometry)
    return dx.permute(0, 3, 1, 2)


def _weight_gradient(do, codes, x, weight, stride, padding, conv_size, pool):
    """dweight and dbias in two stages: partial sums per program, then torch.sum."""
    B, CIN, H, W = x.shape
    C, _, kernel, _ = weight.shape
    columns = CIN * kernel * kernel + 1
    size = [window_count(n, *pool) for n in conv_size]
    if B == 0:
        return weight.new_zeros(weight.shape), weight.new_zeros(C)
    blocks = _weight_blocks(C, columns, x.dtype)
    windows = triton.cdiv(B * size[1], blocks["BLOCK_M"])
    tiles = triton.cdiv(C, blocks["BLOCK_C"]) * triton.cdiv(columns, blocks["BLOCK_K"])
    strip = _rows_per_program(size[0], windows * tiles)
    shares = min(windows * triton.cdiv(size[0], strip), max(PROGRAMS // tiles, 1))
    partial = x.new_empty(shares, C, columns, dtype=torch.float32)
    grid = shares, triton.cdiv(C, blocks["BLOCK_C"]), triton.cdiv(columns, blocks["BLOCK_K"])
    _conv_stem_bwd_dweight[grid](
        do, do.stride(), codes, x, x.stride(), partial, B, C, H, W, *size, strip,
        CIN=CIN, **_geometry(kernel, stride, padding, pool), **blocks,
    )  # fmt: skip
    dweight, dbias = partial.sum(0).to(weight.dtype).split([columns - 1, 1], dim=1)
    dweight = dweight.reshape(C, kernel, kernel, CIN).permute(0, 3, 1, 2).contiguous()
    return dweight, dbias[:, 0].contiguous()
