"""Launchers of the Triton kernels of a block, and the tiles they use.

The tiles are chosen by count, for 132 multiprocessors and weights that every program reads from the
second-level cache anew (docs/kernels.md); none was timed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._triton_utils import next_pow2
from ._triton_kernels import _fc2, _norm_linear, _norm_pool_linear, _project_fc1, _project_mlp

# multiprocessors of the GPU that the tiles are chosen for
PROGRAMS = 132
# rows above which programs take 64 instead of 32 at a time, and 128: then fewer leave the GPU full
MANY, MOST = 8 * PROGRAMS, 64 * PROGRAMS
# rows above which one kernel for a whole MLP, whose programs share no outputs out, fills the GPU
WHOLE_MLP = 48 * PROGRAMS
# tokens x channels at a time of the pooling: 32 per thread of 16 warps
POOL_TILE = 16384


class Tile(NamedTuple):
    """Rows x outputs of a program, most channels of a piece and of a step, and how it runs."""

    rows: int
    columns: int
    piece: int
    depth: int
    warps: int
    stages: int


def _norm_tile(M: int, C: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return Tile(16, 32, 64, 64, 4, 1)
    if M > MOST and C <= 256:
        return Tile(128, 128, 128, 128, 8, 2)
    if M > MANY:
        return Tile(64, 64, 128, 128, 4 if C <= 256 else 8, 2)
    return Tile(32, 64, 128, 128, 4, 1)


def _fc1_tile(M: int, C: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return Tile(16, 32, 64, 16, 8, 1)
    return Tile(64 if M > MANY else 32, 64, 128, 64, 8, 3 if C <= 256 else 2)


def _fc2_tile(M: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return Tile(16, 32, 64, 64, 4, 2)
    return Tile(64, 64, 128, 128, 4, 3) if M > MANY else Tile(32, 32, 128, 128, 4, 3)


def _mlp_tile(M: int, C: int, dtype: torch.dtype) -> Tile | None:
    """Tile of the kernel that keeps the hidden units to itself.

    None where the rows are too few for it to fill a GPU, or too wide for its registers.
    """
    if dtype == torch.float32 or M <= WHOLE_MLP or C > 256:
        return None
    # twice the rows halve the traffic of the weights; 64 units beside 128 x 256 sums spill
    return Tile(128, 32, 64, 128, 8, 2) if M > MOST else Tile(64, 64, 128, 64, 8, 2)


def _fit(channels: int, most: int) -> int:
    # tensor cores want at least 16 inner channels
    return min(max(next_pow2(channels), 16), most)


def _shares(tiles: int, outputs: int, tile: Tile) -> int:
    """Programs among which the outputs of one tile of rows are shared."""
    return min(max(PROGRAMS // tiles, 1), triton.cdiv(outputs, tile.columns))


def _run(tile: Tile) -> dict:
    return {"BLOCK_M": tile.rows, "num_warps": tile.warps, "num_stages": tile.stages}


def norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm without affine part, product, bias: (M, C) -> (M, OUT)."""
    (M, C), OUT = x.shape, len(weight)
    out = x.new_empty(M, OUT)
    if M > 0:
        tile = _norm_tile(M, C, x.dtype)
        tiles = triton.cdiv(M, tile.rows)
        _norm_linear[tiles, _shares(tiles, OUT, tile)](
            x, weight, bias, out, M, eps,
            C=C, OUT=OUT, BLOCK_O=tile.columns, PIECE=_fit(C, tile.piece), **_run(tile),
        )  # fmt: skip
    return out


def project_mlp(
    heads: Tensor,
    x: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    normed_stream: bool,
    eps: float,
) -> Tensor:
    """Projection, residual, LayerNorm, MLP, residual: (M, IN) and (M, C) -> (M, C)."""
    M, C = x.shape
    IN, HIDDEN = heads.shape[1], len(fc1_weight)
    out = torch.empty_like(x)
    if M == 0:
        return out
    before = (heads, x, proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias)
    sizes = {"C": C, "IN": IN, "HIDDEN": HIDDEN, "NORMED": normed_stream}
    tile = _mlp_tile(M, C, x.dtype)
    if tile is not None:
        _project_mlp[(triton.cdiv(M, tile.rows),)](
            *before, fc2_weight, fc2_bias, out, M, eps, **sizes, **_run(tile),
            BLOCK_H=tile.columns, PIECE=_fit(C, tile.piece), DEPTH=_fit(IN, tile.depth),
        )  # fmt: skip
        return out
    tile = _fc1_tile(M, C, x.dtype)
    tiles = triton.cdiv(M, tile.rows)
    stream, hidden = torch.empty_like(x), x.new_empty(M, HIDDEN)
    _project_fc1[tiles, _shares(tiles, HIDDEN, tile)](
        *before, stream, hidden, M, eps, **sizes, **_run(tile),
        BLOCK_H=tile.columns, PIECE=_fit(C, tile.piece), DEPTH=_fit(IN, tile.depth),
    )  # fmt: skip
    tile = _fc2_tile(M, x.dtype)
    _fc2[triton.cdiv(M, tile.rows), triton.cdiv(C, tile.columns)](
        hidden, fc2_weight, fc2_bias, stream, out, M, C=C, HIDDEN=HIDDEN,
        BLOCK_O=tile.columns, DEPTH=_fit(HIDDEN, tile.depth), **_run(tile),
    )  # fmt: skip
    return out


def norm_pool_linear(
    x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm, sequence pooling, product, bias: (B, N, C) -> (B, K) fp32."""
    (B, N, C), K = x.shape, len(weight)
    out = x.new_empty(B, K, dtype=torch.float32)
    if out.numel() > 0:
        block_c = next_pow2(C)
        rows = POOL_TILE // block_c
        _norm_pool_linear[(B,)](
            x, scores, weight, bias, out, N, K, eps, C=C, BLOCK_C=block_c,
            BLOCK_N=min(next_pow2(N), rows), BLOCK_K=min(next_pow2(K), rows),
            num_warps=16, num_stages=1,
        )  # fmt: skip
    return out
