"""The conv stem: the definition in plain PyTorch and its gradient written out.

Everything runs channels-last: tokens are then a view, and PyTorch's CPU pooling is ten times
faster than on separate planes. Sums are fp32 or wider whatever the dtype of the images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import window_count


def conv_stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    pool: list[int],
    need_codes: bool,
) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, C) and, where needed, the codes (B, N, C) that the gradient follows.

    A code is the position in the pool window (row * kernel + column) of the first largest sum,
    or kernel * kernel where the output is zero and passes no gradient on.
    """
    y = F.conv2d(_wide(x), _wide(weight), None, stride, padding)
    width = y.shape[3]
    # bias and ReLU keep the order of the sums, so they can wait for the fewer pooled ones
    kernel, step, border = pool
    y, index = F.max_pool2d(y, kernel, step, border, return_indices=True)
    if bias is not None:
        y += bias.to(y.dtype)[:, None, None]
    y = y.relu_().permute(0, 2, 3, 1).contiguous()  # (B, HO, WO, C)
    out = y.flatten(1, 2).to(x.dtype)
    if not need_codes:
        return out, x.new_empty(0, dtype=torch.uint8)
    codes = _codes_from_index(index.permute(0, 2, 3, 1).contiguous(), width, pool)
    # the code of zero is the largest; masked_fill_ would take thirty times as long
    zero = (y == 0).view(torch.uint8).mul_(kernel * kernel)
    return out, torch.maximum(codes, zero).flatten(1, 2)


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
    """Gradients of images (channels-last), weight and bias; those not needed are empty.

    With dy from `pooled_gradient`, dweight is the correlation of dy with x, dx the transposed
    convolution of dy with weight, dbias the sum of dy; all three are PyTorch's own.
    """
    height, width = (window_count(n, weight.shape[-1], stride, padding) for n in x.shape[2:])
    rows, cols = (window_count(n, *pool) for n in (height, width))
    x_f, weight_f = _wide(x), _wide(weight)
    do, codes = (t.unflatten(1, (rows, cols)) for t in (do.to(x_f.dtype), codes))
    # PyTorch's own scatter is three times faster on a CPU, and on a GPU not deterministic
    gradient = scattered_gradient if x.device.type == "cpu" else pooled_gradient
    dy = gradient(do, codes, height, width, pool).permute(0, 3, 1, 2)  # (B, C, height, width)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dy,
        x_f,
        weight_f,
        [len(weight)],
        [stride] * 2,
        [padding] * 2,
        [1, 1],
        False,
        [0, 0],
        1,
        [need_dx, need_dweight, need_dweight],
    )
    none = x.new_empty(0)
    return (
        dx.to(x.dtype).contiguous(memory_format=torch.channels_last) if need_dx else none,
        dweight.to(weight.dtype).contiguous() if need_dweight else none.clone(),
        dbias.to(weight.dtype) if need_dweight else none.clone(),
    )


def pooled_gradient(do: Tensor, codes: Tensor, height: int, width: int, pool: list[int]) -> Tensor:
    """Gradient of the convolution sums, (B, height, width, C), from that of the pooled ones.

    Every sum gathers from the windows that contain it and whose code names it:
    dy[i] = sum over windows w with 0 <= i - start(w) < kernel of do[w] * (code[w] == i - start(w)).
    """
    kernel, stride, padding = pool
    B, rows, cols, C = do.shape
    reach = [(n - 1) * stride + kernel for n in (rows, cols)]
    sizes = [max(padding + n, r) for n, r in zip((height, width), reach, strict=True)]
    dy = do.new_zeros(B, *sizes, C)
    for code in range(kernel * kernel):
        y, x = divmod(code, kernel)
        chosen = dy[:, y::stride, x::stride][:, :rows, :cols]
        chosen += torch.where(codes == code, do, 0.0)
    return dy[:, padding : padding + height, padding : padding + width]


def scattered_gradient(do, codes, height, width, pool):
    """`pooled_gradient` by PyTorch's pooling backward, which wants positions in the plane."""
    kernel, stride, padding = pool
    y, x = (torch.arange(kernel, device=do.device) for _ in range(2))
    table = torch.cat([(y[:, None] * width + x).flatten(), torch.zeros(1, dtype=torch.int64)])
    index = table.index_select(0, codes.flatten().int()).view(codes.shape)
    # a zero's gradient is dropped, so that any place in the plane does for it
    index.add_(_window_starts(codes, pool, width)).clamp_min_(0)
    do = torch.ops.aten.threshold_backward(do, (codes < kernel * kernel).to(do.dtype), 0)
    plane = do.new_empty(len(do), height, width, do.shape[3]).permute(0, 3, 1, 2)
    dy = torch.ops.aten.max_pool2d_with_indices_backward(
        do.permute(0, 3, 1, 2),
        plane,
        [kernel] * 2,
        [stride] * 2,
        [padding] * 2,
        [1, 1],
        False,
        index.permute(0, 3, 1, 2),
    )
    return dy.permute(0, 2, 3, 1)


def _codes_from_index(index: Tensor, width: int, pool: list[int]) -> Tensor:
    """Positions in the window, uint8, from positions in the plane, both (B, rows, cols, C)."""
    # row * kernel + column counts the same in plane and window, up to the start of the window;
    # modulo 256 is exact because a code is below 256, and a table spares integer divisions
    rows = (index.shape[1] - 1) * pool[1] + pool[0]
    y, x = (torch.arange(n, device=index.device) for n in (rows, width))
    table = (y[:, None] * pool[0] + x).flatten().to(torch.uint8)
    codes = table.index_select(0, index.flatten()).view(index.shape)
    return codes.sub_(_window_starts(index, pool, pool[0]).to(torch.uint8))


def _window_starts(like: Tensor, pool: list[int], pitch: int) -> Tensor:
    """row * pitch + column of the first position of every window, (rows, cols, 1)."""
    _, stride, padding = pool
    y, x = (torch.arange(n, device=like.device) * stride - padding for n in like.shape[1:3])
    return (y[:, None] * pitch + x)[..., None]


def _wide(t: Tensor) -> Tensor:
    """At least fp32, channels-last, with the strides that say so even if one channel is all."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    return t.to(dtype, memory_format=torch.channels_last)
