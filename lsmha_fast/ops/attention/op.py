"""Attention with many small heads: public functions, their checks, the choice of backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._ext import cpp_check, cuda_check
from .._dispatch import Check, always, resolve_backend, triton_check
from .arguments import check_float, check_qkv, options_of
from .registration import Attention, AttentionPacked, run
from .registration_weights import AttentionWeights, AttentionWithWeights

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
# With few heads in all the shorter way to the kernel counts more: 1.05 to 2 times as fast up to 16.
# All of `python -m benchmarks.dispatch --threads 1` has no other case that loses 10 %.
SHORT_BF16 = 48
WIDE_BF16 = 64
MANY_BF16 = 32


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
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"FlashAttention-2 takes head dims 8, 16, ..., 256, got {q.shape[-1]}; {other}"
    return None


def _triton_check(q: Tensor, key_mask, bias, dropout_p: float) -> str | None:
    """Reason why the Triton kernels cannot take this call, or None."""
    if q.shape[-1] > TRITON_MAX_HEAD_DIM:
        return f"head dim {q.shape[-1]} exceeds {TRITON_MAX_HEAD_DIM}; use 'sdpa' or 'reference'"
    return triton_check(q, (torch.float32, torch.float16, torch.bfloat16))


def _cpp_check(q: Tensor, key_mask, bias, dropout_p: float) -> str | None:
    """Reason why the native CPU kernels cannot take this call, or None."""
    return cpp_check(q, (torch.float32, torch.bfloat16, torch.float64))


def _cuda_check(q: Tensor, key_mask, bias, dropout_p: float) -> str | None:
    """Reason why the CUDA kernels cannot take this call, or None."""
    if bias is not None:
        return "its kernels take no bias; use 'triton' or 'reference'"
    if q.shape[-1] > CUDA_MAX_HEAD_DIM:
        return f"head dim {q.shape[-1]} exceeds {CUDA_MAX_HEAD_DIM}; use 'triton' or 'sdpa'"
    return cuda_check(q, (torch.float32, torch.float16, torch.bfloat16))


CHECKS: dict[str, Check] = {
    "reference": always,
    "sdpa": _sdpa_check,
    "triton": _triton_check,
    "cpp": _cpp_check,
    "cuda": _cuda_check,
}


def _cpp_weights_check(q: Tensor) -> str | None:
    """Reason why the native CPU kernels cannot average the weights of this call, or None."""
    return cpp_check(q, (torch.float32, torch.bfloat16))


# of averaged weights
WEIGHTS_CHECKS: dict[str, Check] = {"reference": always, "cpp": _cpp_weights_check}


def _cpp_max_head_dim() -> int:
    # what is not in the table belongs to other processors, where the kernels are the portable ones
    capability = torch.backends.cpu.get_cpu_capability()
    return CPP_MAX_HEAD_DIM.get(capability, CPP_MAX_HEAD_DIM["DEFAULT"])


# torch.compile then calls it instead of tracing it, see ext_missing
_cpp_max_head_dim._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _order(q: Tensor, L: int) -> tuple[str, ...]:
    """Backends to try for L queries like those of `q`, (..., D), fastest first.

    Triton on a CPU is the slow interpreter: on request only.
    """
    D = q.shape[-1]
    if q.is_cuda:
        return ("cuda", "triton", "sdpa") if D < SDPA_MIN_HEAD_DIM else ("sdpa", "triton")
    if not q.is_cpu:
        return ()
    if q.dtype == torch.float64:  # the native kernel for it is there to check gradients
        return ("sdpa",)
    short = L < SHORT_BF16 and D >= WIDE_BF16 and q.dtype == torch.bfloat16
    many = q.shape[0] * q.shape[1 if q.ndim == 4 else 3] >= MANY_BF16  # packed: (B, N, 3, H, D)
    inference = not (q.requires_grad and torch.is_grad_enabled())
    if _cpp_max_head_dim() < D or (short and many and inference):
        return ("sdpa", "cpp")
    return ("cpp", "sdpa")


def default_backend(q: Tensor, key_mask=None, bias=None, dropout_p: float = 0.0) -> str:
    """The backend that `attention` takes for a call when the caller names none."""
    return _resolve("attention", None, q, q.shape[2], key_mask, bias, dropout_p)


def _resolve(name: str, backend: str | None, q: Tensor, L: int, *options) -> str:
    return resolve_backend(name, backend, CHECKS, _order(q, L), q, *options)


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
    name = "attention"
    sizes = check_qkv(name, q, k, v)
    bias, options = options_of(name, q, sizes, key_mask, bias, dropout_p, scale, head_scale)
    backend = _resolve(name, backend, q, sizes[2], key_mask, bias, dropout_p)
    return run(Attention, q, k, v, key_mask, bias, head_scale, *options, backend)[0]


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
    check_float(name, qkv)
    B, N, _, H, _ = qkv.shape
    sizes = B, H, N, N
    bias, options = options_of(name, qkv, sizes, key_mask, bias, dropout_p, scale, head_scale)
    backend = _resolve(name, backend, qkv, N, key_mask, bias, dropout_p)
    return run(AttentionPacked, qkv, key_mask, bias, head_scale, *options, backend)[0]


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax weights, after dropout, averaged over the heads; never (B, H, L, S) in memory.

    Args:
        q: queries, (B, H, L, D), float.
        k: keys, (B, H, S, D).
        key_mask: see `attention`, as the other arguments.
        bias: see `attention`.
        dropout_p: see `attention`.
        scale: see `attention`.
        backend: "reference" (a few heads at a time) or "cpp"; by default the faster one.

    Returns:
        (B, L, S) in the dtype of `q`; a query without keys has weights zero.

    Raises:
        ValueError: shapes, dtypes or values do not fit, or the backend does not exist.
        RuntimeError: the named backend cannot run this call.
    """
    name = "attention_weights"
    sizes = check_qkv(name, q, k)
    bias, options = options_of(name, q, sizes, key_mask, bias, dropout_p, scale, None)
    backend = resolve_backend(name, backend, WEIGHTS_CHECKS, ("cpp",), q)
    return run(AttentionWeights, q, k, key_mask, bias, *options, backend)[0]


class AttentionAndWeights(NamedTuple):
    """Results of `attention_with_weights`."""

    out: Tensor  # (B, H, L, D), as of `attention`
    weights: Tensor  # (B, L, S), as of `attention_weights`


def attention_with_weights(
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
) -> AttentionAndWeights:
    """`attention` and the head average of the very weights it used, after dropout.

    Args:
        q, k, v, key_mask, bias, dropout_p, scale, head_scale: see `attention`.
        backend: as of `attention`; "cpp" computes every weight once for both results, beside the
            others the weights are computed a second time, by "reference". By default "cpp" where it
            can run the call.

    Returns:
        (output (B, H, L, D) as of `attention`, weights (B, L, S) as of `attention_weights`).

    Raises:
        ValueError: shapes, dtypes or values do not fit, or the backend does not exist.
        RuntimeError: the named backend cannot run this call.
    """
    name = "attention_with_weights"
    sizes = check_qkv(name, q, k, v)
    bias, options = options_of(name, q, sizes, key_mask, bias, dropout_p, scale, head_scale)
    if backend is None and WEIGHTS_CHECKS["cpp"](q) is None:
        backend = "cpp"
    backend = _resolve(name, backend, q, sizes[2], key_mask, bias, dropout_p)
    if backend in WEIGHTS_CHECKS and WEIGHTS_CHECKS[backend](q) is None:
        out, weights = run(
            AttentionWithWeights, q, k, v, key_mask, bias, head_scale, *options, backend
        )[:2]
    else:
        out = run(Attention, q, k, v, key_mask, bias, head_scale, *options, backend)[0]
        weights = run(AttentionWeights, q, k, key_mask, bias, *options, "reference")[0]
    return AttentionAndWeights(out, weights)
