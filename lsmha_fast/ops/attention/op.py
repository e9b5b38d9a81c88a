"""Attention with many small heads: public functions, their checks, the choice of backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._ext import cpp_check, cuda_check
from .._dispatch import Check, always, resolve_backend, triton_check
from .registration import Attention, AttentionPacked, AttentionWeights

# the kernels are built and checked for spills up to here; the project's heads are 1 to 64 wide
TRITON_MAX_HEAD_DIM = 64
# channels that the widest operands of the kernels have room for
CUDA_MAX_HEAD_DIM = 16
# FlashAttention-2 computes 32 channels whatever the head dim is; below, the Triton kernel's 16 win
SDPA_MIN_HEAD_DIM = 32
# Widest head that the native CPU kernels take by default, by PyTorch's name of the instruction set.
# Measured at N = 256 against PyTorch's kernel, one thread, forward: with AVX-512 8 times as fast at
# D = 2, 1.2 at 32 and 1.1 at 128, where both spend their time in equally good matrix products; with
# AVX2 1.1 at 16 and 0.9 at 32; without either 1.3 (with the gradient) at 16 and 0.9 at 32.
CPP_MAX_HEAD_DIM = {"AVX512": 128, "AVX2": 16, "DEFAULT": 16}
# Inference in bfloat16 with heads so wide and fewer keys than this: there the native kernels spend
# their time on bringing the queries into place, 1.2 to 1.4 times PyTorch's (B = 2, H = 32, D = 64,
# N = 8 to 32; 1.05 at 48). With the gradient they take 0.4 of its time, at D = 48 0.7.
# All of `python -m benchmarks.dispatch --threads 1` has no other case that loses 10 %.
SHORT_BF16 = 48
WIDE_BF16 = 64


def _sdpa_check(q: Tensor, key_mask, bias, dropout_p: float) -> str | None:
    """Reason why PyTorch's fused kernels cannot take this call, or None."""
    other = "use 'cpp', 'triton' or 'reference'"
    if dropout_p > 0:
        return f"it gives no control over dropout's random bits; {other}"
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return f"it has no gradient for the bias; {other}"
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda":
        return f"it needs a CPU or CUDA tensor, got one on {q.device}; use 'reference'"
    if bias is not None or key_mask is not None:
        return f"FlashAttention-2 takes neither key_mask nor bias; {other}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention-2 takes float16 and bfloat16, got {q.dtype}; {other}"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return f"FlashAttention-2 takes head dims 8, 16, ..., 256, got {q.shape[3]}; {other}"
    return None


def _triton_check(q: Tensor, key_mask, bias, dropout_p: float) -> str | None:
    """Reason why the Triton kernels cannot take this call, or None."""
    if q.shape[3] > TRITON_MAX_HEAD_DIM:
        return f"head dim {q.shape[3]} exceeds {TRITON_MAX_HEAD_DIM}; use 'sdpa' or 'reference'"
    return triton_check(q, (torch.float32, torch.float16, torch.bfloat16))


def _cpp_check(q: Tensor, key_mask, bias, dropout_p: float) -> str | None:
    """Reason why the native CPU kernels cannot take this call, or None."""
    return cpp_check(q, (torch.float32, torch.bfloat16, torch.float64))


def _cuda_check(q: Tensor, key_mask, bias, dropout_p: float) -> str | None:
    """Reason why the CUDA kernels cannot take this call, or None."""
    if bias is not None:
        return "its kernels take no bias; use 'triton' or 'reference'"
    if q.shape[3] > CUDA_MAX_HEAD_DIM:
        return f"head dim {q.shape[3]} exceeds {CUDA_MAX_HEAD_DIM}; use 'triton' or 'sdpa'"
    return cuda_check(q, (torch.float32, torch.float16, torch.bfloat16))


CHECKS: dict[str, Check] = {
    "reference": always,
    "sdpa": _sdpa_check,
    "triton": _triton_check,
    "cpp": _cpp_check,
    "cuda": _cuda_check,
}
WEIGHTS_CHECKS: dict[str, Check] = {"reference": always}


def _cpp_max_head_dim() -> int:
    # what is not in the table belongs to other processors, where the kernels are the portable ones
    capability = torch.backends.cpu.get_cpu_capability()
    return CPP_MAX_HEAD_DIM.get(capability, CPP_MAX_HEAD_DIM["DEFAULT"])


# torch.compile then calls it instead of tracing it, see ext_missing
_cpp_max_head_dim._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _order(q: Tensor) -> tuple[str, ...]:
    """Backends to try, fastest first; Triton on a CPU is the slow interpreter: on request only."""
    if q.device.type == "cuda":
        small = q.shape[3] < SDPA_MIN_HEAD_DIM
        return ("cuda", "triton", "sdpa") if small else ("sdpa", "triton")
    if q.device.type != "cpu":
        return ()
    if q.dtype == torch.float64:  # the native kernel for it is there to check gradients
        return ("sdpa",)
    short = q.dtype == torch.bfloat16 and q.shape[2] < SHORT_BF16 and q.shape[3] >= WIDE_BF16
    inference = not (q.requires_grad and torch.is_grad_enabled())
    if q.shape[3] > _cpp_max_head_dim() or (short and inference):
        return ("sdpa", "cpp")
    return ("cpp", "sdpa")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    head_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of every head: `head_scale * dropout(softmax(scale q k^T + bias)) v`.

    Args:
        q: queries, (B, H, L, D), float; any strides, read in place.
        k: keys, (B, H, S, D).
        v: values, (B, H, S, D).
        key_mask: (B, S) bool, True where a key takes part. A query without keys gives zeros.
        bias: float, broadcastable to (B, H, L, S), added to the logits; may hold -inf.
        dropout_p: probability of dropping a weight, rounded to a multiple of 2^-16. Random bits
            come from torch's generator of the device; apply it in training only.
        scale: factor of the logits, finite and > 0; by default D^-0.5.
        head_scale: (H,) float, multiplies each head's output; 0 silences a head.
        backend: "reference", "sdpa", "triton", "cpp" or "cuda"; by default the fastest one for this
            call.

    Returns:
        (B, H, L, D) in the dtype of `q`, in memory (B, L, H, D): merging the heads copies nothing.

    Raises:
        ValueError: shapes, dtypes or values do not fit, or the backend does not exist.
        RuntimeError: the named backend cannot run this call.
    """
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or _without_tokens(q) != _without_tokens(k):
        raise ValueError(
            "attention: expected q (B, H, L, D) and k, v (B, H, S, D), "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    _check_same("attention", q, k=k, v=v)
    bias, options = _options("attention", q, k, key_mask, bias, dropout_p, scale, head_scale)
    backend = resolve_backend("attention", backend, CHECKS, _order(q), q, key_mask, bias, dropout_p)
    return Attention.apply(q, k, v, key_mask, bias, head_scale, *options, backend)[0]


def attention_packed(
    qkv: Tensor,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    head_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Self-attention straight from a packed projection; its gradient is written packed, too.

    Args:
        qkv: queries, keys and values, (B, N, 3, H, D): the output of one `nn.Linear(C, 3 H D)`
            seen as 5 dimensions. Any strides, read in place.
        key_mask: (B, N) bool, see `attention`, as the other arguments.
        bias: see `attention`.
        dropout_p: see `attention`.
        scale: see `attention`.
        head_scale: see `attention`.
        backend: see `attention`.

    Returns:
        (B, N, H, D), contiguous, in the dtype of `qkv`.

    Raises:
        ValueError: shapes, dtypes or values do not fit, or the backend does not exist.
        RuntimeError: the named backend cannot run this call.
    """
    name = "attention_packed"
    if qkv.ndim != 5 or qkv.shape[2] != 3 or 0 in qkv.shape[3:]:
        raise ValueError(f"{name}: expected qkv (B, N, 3, H, D), got {tuple(qkv.shape)}")
    q = qkv[:, :, 0].transpose(1, 2)
    _check_same(name, q)
    bias, options = _options(name, q, q, key_mask, bias, dropout_p, scale, head_scale)
    backend = resolve_backend(name, backend, CHECKS, _order(q), q, key_mask, bias, dropout_p)
    return AttentionPacked.apply(qkv, key_mask, bias, head_scale, *options, backend)[0]


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax weights averaged over the heads; no (B, H, L, S) tensor is ever in memory.

    Args:
        q: queries, (B, H, L, D), float.
        k: keys, (B, H, S, D).
        key_mask: see `attention`.
        bias: see `attention`.
        scale: see `attention`.
        backend: "reference" (a few heads at a time), which is the default.

    Returns:
        (B, L, S) in the dtype of `q`; a query without keys has weights zero.

    Raises:
        ValueError: shapes, dtypes or values do not fit, or the backend does not exist.
    """
    name = "attention_weights"
    if q.ndim != 4 or k.ndim != 4 or _without_tokens(q) != _without_tokens(k):
        raise ValueError(
            f"{name}: expected q (B, H, L, D) and k (B, H, S, D), "
            f"got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    _check_same(name, q, k=k)
    bias, (_, _, scale) = _options(name, q, k, key_mask, bias, 0.0, scale, None)
    backend = resolve_backend(name, backend, WEIGHTS_CHECKS, ())
    return AttentionWeights.apply(q, k, key_mask, bias, scale, backend)[0]


def _without_tokens(x: Tensor) -> tuple[int, int, int]:
    B, H, _, D = x.shape
    return B, H, D


def _check_same(name: str, q: Tensor, **others: Tensor) -> None:
    if not q.is_floating_point() or 0 in (q.shape[1], q.shape[3]):
        raise ValueError(
            f"{name}: expected a float dtype and H, D >= 1, got {q.dtype} and {tuple(q.shape)}"
        )
    for other, t in others.items():
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(
                f"{name}: expected {other} like q ({q.dtype}, {q.device}), "
                f"got {t.dtype}, {t.device}"
            )


def _options(name, q, k, key_mask, bias, dropout_p, scale, head_scale):
    """Check what the three functions share; return the 4-dimensional bias and
    (seed, dropout_p, scale)."""
    B, H, L, D = q.shape
    S = k.shape[2]
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
        bias = _as_4d(name, bias, (B, H, L, S))
    for other, t in (("key_mask", key_mask), ("bias", bias), ("head_scale", head_scale)):
        if t is not None and t.device != q.device:
            raise ValueError(f"{name}: {other} is on {t.device}, q on {q.device}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{name}: dropout_p must be between 0 and 1, got {dropout_p}")
    scale = D**-0.5 if scale is None else scale
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
