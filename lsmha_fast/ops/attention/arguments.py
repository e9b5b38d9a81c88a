"""Checks of what is passed to the public functions of attention; an error shows the values."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_qkv(name: str, q: Tensor, k: Tensor, v: Tensor | None = None) -> tuple[int, ...]:
    """Queries (B, H, L, D), keys and, if given, values (B, H, S, D) of one dtype and device.

    Returns:
        (B, H, L, S).
    """
    shape, keys = q.shape, k.shape
    fits = len(shape) == 4 and (shape == keys or _without_tokens(shape) == _without_tokens(keys))
    if not fits or (v is not None and v.shape != keys):
        names, others = ("k", {"k": k}) if v is None else ("k, v", {"k": k, "v": v})
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in others.items())
        raise ValueError(
            f"{name}: expected q (B, H, L, D) and {names} (B, H, S, D), "
            f"got q {tuple(shape)}, {shapes}"
        )
    check_float(name, q, shape[1], shape[3])
    dtype, device = q.dtype, q.device
    for other, t in (("k", k), ("v", v)):
        if t is not None and (t.dtype != dtype or t.device != device):
            raise ValueError(
                f"{name}: expected {other} like q ({dtype}, {device}), got {t.dtype}, {t.device}"
            )
    return (*shape[:3], keys[2])


def _without_tokens(shape: torch.Size) -> tuple[int, ...]:
    return (*shape[:2], *shape[3:])


def check_float(name: str, q: Tensor, *sizes: int) -> None:
    """Dtype of a call, and that none of the sizes H and D is zero."""
    if 0 in sizes or not q.dtype.is_floating_point:
        raise ValueError(
            f"{name}: expected a float dtype and H, D >= 1, got {q.dtype} and {tuple(q.shape)}"
        )


def options_of(name, q, sizes, key_mask, bias, dropout_p, scale, head_scale):
    """Check what the public functions share; return the 4-dimensional bias and
    (seed, dropout_p, scale).

    `q` is any tensor of the call with D channels; sizes are (B, H, L, S).
    """
    B, H, _, S = sizes
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (B, S)):
        raise ValueError(
            f"{name}: expected key_mask (B, S) = {(B, S)} bool, "
            f"got {tuple(key_mask.shape)} {key_mask.dtype}"
        )
    if head_scale is not None and (head_scale.shape != (H,) or not head_scale.is_floating_point()):
        raise ValueError(
            f"{name}: expected head_scale (H,) = ({H},) float, "
            f"got {tuple(head_scale.shape)} {head_scale.dtype}"
        )
    if bias is not None:
        bias = _as_4d(name, bias, sizes)
    if not (key_mask is bias is head_scale):  # else all are None
        for other, t in (("key_mask", key_mask), ("bias", bias), ("head_scale", head_scale)):
            if t is not None and t.device != q.device:
                raise ValueError(f"{name}: {other} is on {t.device}, q on {q.device}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{name}: dropout_p must be between 0 and 1, got {dropout_p}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"{name}: scale must be finite and > 0, got {scale}")
    # drawn on the device: no wait for it, and a CUDA graph draws anew at every replay
    seed = torch.randint(2**63 - 1, (1,), device=q.device) if dropout_p > 0 else None
    return bias, (seed, float(dropout_p), scale)


def _as_4d(name: str, bias: Tensor, full: tuple[int, ...]) -> Tensor:
    shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    fits = len(shape) == 4 and all(n in (1, m) for n, m in zip(shape, full, strict=True))
    if not fits or not bias.is_floating_point():
        raise ValueError(
            f"{name}: expected a float bias that broadcasts to (B, H, L, S) = {full}, "
            f"got {tuple(bias.shape)} {bias.dtype}"
        )
    return bias.reshape(shape)
