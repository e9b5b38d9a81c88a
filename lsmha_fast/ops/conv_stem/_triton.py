"""The conv stem in Triton: pooled tokens straight from the image, and the gradients.

Forward: a program owns BLOCK_M pooled columns (image, column), walks down the pooled rows and
keeps running maxima of convolution sums, so nothing of the convolution's resolution reaches
memory. The last row of a window is the first of the next one and is carried over; only columns
shared by neighbouring windows are summed twice. For the 3x3/2 pooling this makes
1.5 (1 + 1 / (2 STRIP)) times the multiplications of the plain convolution, against 2.25 without
the carry. Bias and ReLU follow the maximum, on a quarter of the values.

Backward: every window sends its gradient to the position that its code names, so the gradient of
the weight is, per position in the window, a product of masked `do` with the patches there: each
`do` and code is read once and nothing is scattered. Partial sums per program are added by
torch.sum: no atomics. With an image gradient wanted, the gradient `dy` of the convolution sums is
gathered into memory once and dx is the forward kernel on it, with mirrored filters; this is
deterministic and exact in fp32 without touching cuDNN's global flags. A stride of s makes dx
multiply s * s times more zeros than needed; tokenizers convolve later layers with stride 1 or 2.
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
    CIN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """Image values under the filter at (oy, ox) of each image b: [BLOCK_M, BLOCK_K].

    UP spreads the image by zeros: the transposed convolution reads dy so.
    """
    ci = k % CIN
    tap = k // CIN
    ky = tap // KERNEL
    kx = tap % KERNEL
    y0 = oy * STRIDE - PADDING
    x0 = ox * STRIDE - PADDING  # [BLOCK_M]
    iy = y0 + ky  # [BLOCK_K]
    ix = x0[:, None] + kx[None, :]  # [BLOCK_M, BLOCK_K]
    # unsigned, so that one comparison covers both ends
    inside = (k < CIN * KERNEL * KERNEL) & (iy.to(tl.uint32) < (H * UP).to(tl.uint32))
    inside = inside[None, :] & (ix.to(tl.uint32) < (W * UP).to(tl.uint32))
    image = x_ptr + b * x_stride[0]  # [BLOCK_M]
    if UP == 1:
        # a sum of what depends on the position and what depends on the tap: one addition each
        position = image + (y0 * x_stride[2] + x0 * x_stride[3])
        ptrs = position[:, None] + (ci * x_stride[1] + ky * x_stride[2] + kx * x_stride[3])[None, :]
    else:
        inside = inside & (iy % UP == 0)[None, :] & (ix % UP == 0)
        from_k = ci * x_stride[1] + iy // UP * x_stride[2]
        ptrs = image[:, None] + from_k[None, :] + ix // UP * x_stride[3]
    return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def _filters(weight_ptr, weight_stride, k, c, C, CIN: tl.constexpr, KERNEL: tl.constexpr):
    """Filter values in the order of the patches: [BLOCK_K, BLOCK_C]."""
    tap = k // CIN
    from_k = (k % CIN) * weight_stride[1]
    from_k += (tap // KERNEL) * weight_stride[2] + (tap % KERNEL) * weight_stride[3]
    ptrs = weight_ptr + from_k[:, None] + (c * weight_stride[0])[None, :]
    return tl.load(ptrs, mask=(k < CIN * KERNEL * KERNEL)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _first_max(best, code, value, value_code):
    """The larger value and its code, the earlier one among equals; NaN wins, as in PyTorch."""
    code = tl.where(value > best, value_code, code)
    return tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL), code


@triton.jit
def _conv_row(
    x_ptr, x_stride, weight_ptr, weight_stride, weight, b, px, c, oy, H, W, C, HC, WC,
    CIN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    UP: tl.constexpr, POOL_KERNEL: tl.constexpr, POOL_STRIDE: tl.constexpr,
    POOL_PADDING: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Largest sums of convolution row oy within each pooled column, and where: [BLOCK_M, BLOCK_C].

    Positions outside the convolution's output count as minus infinity.
    """
    K: tl.constexpr = CIN * KERNEL * KERNEL
    BLOCK_M: tl.constexpr = px.shape[0]
    BLOCK_C: tl.constexpr = c.shape[0]
    best = tl.full([BLOCK_M, BLOCK_C], -float("inf"), tl.float32)
    code = tl.zeros([BLOCK_M, BLOCK_C], tl.int32)
    for kx in tl.static_range(POOL_KERNEL):
        ox = px * POOL_STRIDE - POOL_PADDING + kx
        sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        if K <= BLOCK_K:
            k = tl.arange(0, BLOCK_K)
            patches = _patches(
                x_ptr, x_stride, b, oy, ox, k, H, W, CIN, KERNEL, STRIDE, PADDING, UP
            )
            sums = tl.dot(patches, weight, sums, input_precision="ieee")
        else:
            for k0 in range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                patches = _patches(
                    x_ptr, x_stride, b, oy, ox, k, H, W, CIN, KERNEL, STRIDE, PADDING, UP
                )
                chunk = _filters(weight_ptr, weight_stride, k, c, C, CIN, KERNEL)
                sums = tl.dot(patches, chunk, sums, input_precision="ieee")
        # windows leave the plane by their first or last POOL_PADDING positions only
        if kx < POOL_PADDING or kx >= POOL_KERNEL - POOL_PADDING:
            sums = tl.where(((ox >= 0) & (ox < WC))[:, None], sums, -float("inf"))
        best, code = _first_max(best, code, sums, kx)
    return tl.where((oy >= 0) & (oy < HC), best, -float("inf")), code


@triton.jit
def _conv_stem_fwd(
    x_ptr, x_stride, weight_ptr, weight_stride, bias_ptr, out_ptr, codes_ptr,
    B, C, H, W, HC, WC, HO, WO, STRIP,
    CIN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    UP: tl.constexpr, POOL_KERNEL: tl.constexpr, POOL_STRIDE: tl.constexpr,
    POOL_PADDING: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    CARRY: tl.constexpr = POOL_KERNEL - POOL_STRIDE == 1
    column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(2) * STRIP
    # columns past the last one repeat it and are not stored
    valid = column < B * WO
    column = tl.minimum(column, B * WO - 1)
    b = (column // WO).to(tl.int64)
    px = column % WO
    weight = _filters(weight_ptr, weight_stride, tl.arange(0, BLOCK_K), c, C, CIN, KERNEL)

    if CARRY:
        row, row_code = _conv_row(
            x_ptr, x_stride, weight_ptr, weight_stride, weight, b, px, c,
            first * POOL_STRIDE - POOL_PADDING, H, W, C, HC, WC, CIN, KERNEL, STRIDE, PADDING, UP,
            POOL_KERNEL, POOL_STRIDE, POOL_PADDING, BLOCK_K,
        )  # fmt: skip
    for py in range(first, tl.minimum(first + STRIP, HO)):
        best = tl.full([BLOCK_M, BLOCK_C], -float("inf"), tl.float32)
        code = tl.zeros([BLOCK_M, BLOCK_C], tl.int32)
        if CARRY:
            best, code = row, row_code
        for ky in tl.static_range(1 if CARRY else 0, POOL_KERNEL):
            row, row_code = _conv_row(
                x_ptr, x_stride, weight_ptr, weight_stride, weight, b, px, c,
                py * POOL_STRIDE - POOL_PADDING + ky, H, W, C, HC, WC, CIN, KERNEL, STRIDE,
                PADDING, UP, POOL_KERNEL, POOL_STRIDE, POOL_PADDING, BLOCK_K,
            )  # fmt: skip
            best, code = _first_max(best, code, row, row_code + ky * POOL_KERNEL)

        if bias_ptr is not None:
            best += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        if RELU:
            zero = best <= 0
            best = tl.where(zero, 0.0, best)
            code = tl.where(zero, POOL_KERNEL * POOL_KERNEL, code)
        mask = valid[:, None] & (c < C)[None, :]
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
    do_ptr, do_stride, codes_ptr, x_ptr, x_stride, dweight_ptr, dbias_ptr,
    B, C, H, W, HO, WO, STRIP,
    CIN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    POOL_KERNEL: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over one share of the windows: dweight (shares, C, K), dbias (shares, C).

    Without codes `do` is the gradient of the convolution sums themselves (POOL_KERNEL = 1).
    """
    K: tl.constexpr = CIN * KERNEL * KERNEL
    share = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    strips = tl.cdiv(HO, STRIP)
    dweight = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    dbias = tl.zeros([BLOCK_C], tl.float32)

    for item in range(share, tl.cdiv(B * WO, BLOCK_M) * strips, tl.num_programs(0)):
        column = (item // strips) * BLOCK_M + tl.arange(0, BLOCK_M)
        first = (item % strips) * STRIP
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
                do = tl.where(code < POOL_KERNEL * POOL_KERNEL, do, 0.0)
            dbias += tl.sum(do.to(tl.float32), axis=0)
            for i in tl.static_range(POOL_KERNEL * POOL_KERNEL):
                oy = py * POOL_STRIDE - POOL_PADDING + i // POOL_KERNEL
                ox = px * POOL_STRIDE - POOL_PADDING + i % POOL_KERNEL
                patches = _patches(
                    x_ptr, x_stride, b, oy, ox, k, H, W, CIN, KERNEL, STRIDE, PADDING, 1
                )
                dy = do
                if codes_ptr is not None:
                    dy = tl.where(code == i, do, 0.0)
                dweight = tl.dot(tl.trans(dy), patches, dweight, input_precision="ieee")

    ptrs = dweight_ptr + (share * C + c)[:, None].to(tl.int64) * K + k[None, :]
    tl.store(ptrs, dweight, mask=(c < C)[:, None] & (k < K)[None, :])
    if tl.program_id(2) == 0:
        tl.store(dbias_ptr + share * C + c, dbias, mask=c < C)


def _blocks(C: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes: what compiles for sm_90 without spills (`aot_configs`), not yet timed."""
    deepest = 16 if dtype == torch.float32 else 64
    return {
        "BLOCK_M": 64,
        "BLOCK_C": min(max(next_pow2(C), 16), 64),
        "BLOCK_K": min(max(next_pow2(K), 16), deepest),
        "num_warps": 8,
        "num_stages": 2,
    }


def _rows_per_program(rows: int, programs: int) -> int:
    """How many rows one program walks so that all of them still fill the GPU."""
    strips = min(max(PROGRAMS // max(programs, 1), 1), rows)
    return triton.cdiv(rows, strips)


def _geometry(kernel, stride, padding, pool):
    names = ("KERNEL", "STRIDE", "PADDING", "POOL_KERNEL", "POOL_STRIDE", "POOL_PADDING")
    return dict(zip(names, (kernel, stride, padding, *pool), strict=True))


def _launch_forward(x, weight, bias, out, codes, conv_size, size, relu, up, geometry):
    B, CIN, H, W = x.shape
    C, _, kernel, _ = weight.shape
    blocks = _blocks(C, CIN * kernel * kernel, x.dtype)
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
        block_c = min(max(next_pow2(C), 16), 128)
        _conv_stem_bwd_dy[triton.cdiv(rows, 32), triton.cdiv(C, block_c)](
            do, do.stride(), codes, dy, len(do), C, *conv_size, *size,
            kernel, stride, padding, BLOCK_M=32, BLOCK_C=block_c, num_warps=4,
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
    K = CIN * kernel * kernel
    size = [window_count(n, *pool) for n in conv_size]
    if B == 0:
        return torch.zeros_like(weight), weight.new_zeros(C)
    blocks = _blocks(C, K, x.dtype)
    columns = triton.cdiv(B * size[1], blocks["BLOCK_M"])
    tiles = triton.cdiv(C, blocks["BLOCK_C"]), triton.cdiv(K, blocks["BLOCK_K"])
    strip = _rows_per_program(size[0], columns * tiles[0] * tiles[1])
    items = columns * triton.cdiv(size[0], strip)
    shares = min(items, max(PROGRAMS // (tiles[0] * tiles[1]), 1))
    dweight = x.new_empty(shares, C, K, dtype=torch.float32)
    dbias = x.new_empty(shares, C, dtype=torch.float32)
    _conv_stem_bwd_dweight[(shares, *tiles)](
        do, do.stride(), codes, x, x.stride(), dweight, dbias,
        B, C, H, W, *size, strip,
        CIN=CIN, **_geometry(kernel, stride, padding, pool), **blocks,
    )  # fmt: skip
    dweight = dweight.sum(0).view(C, kernel, kernel, CIN).permute(0, 3, 1, 2)
    return dweight.to(weight.dtype).contiguous(), dbias.sum(0).to(weight.dtype)
