"""What stands around attention in an encoder, for inference: functions, schemas, fake kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import always, impl, load_backend, resolve_backend, triton_check

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# channels of a row, which the kernels keep in registers
WIDEST = 512

# weight and bias of a linear map, and of a norm, which has both or none
Linear = tuple[Tensor, Tensor | None]
Norm = tuple[Tensor, Tensor] | tuple[None, None]


def _triton_check(x, tensors):
    if (odd := next((t for t in tensors if t.dtype != x.dtype), None)) is not None:
        return f"it needs one dtype, got {x.dtype} and {odd.dtype}"
    if x.shape[-1] > WIDEST:
        return f"it needs rows of at most {WIDEST} channels, got {x.shape[-1]}"
    return triton_check(x, DTYPES)


CHECKS = {"reference": always, "triton": _triton_check}

# by device, fastest first; Triton's interpreter is for tests that name it
ORDER = {"cuda": ("triton",)}

torch.library.define(
    "lsmha_fast::norm_linear",
    "(Tensor x, Tensor weight, Tensor? bias, float eps, str backend) -> Tensor",
)
torch.library.define(
    "lsmha_fast::project_mlp",
    "(Tensor heads, Tensor x, Tensor proj_weight, Tensor? proj_bias, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "bool normed_stream, float eps, str backend) -> Tensor",
)
torch.library.define(
    "lsmha_fast::norm_pool_linear",
    "(Tensor x, Tensor scores, Tensor weight, Tensor? bias, float eps, str backend) -> Tensor",
)


@impl("lsmha_fast::norm_linear")
def _norm_linear_impl(*args):
    return load_backend(__package__, args[-1]).norm_linear(*args[:-1])


@impl("lsmha_fast::project_mlp")
def _project_mlp_impl(*args):
    return load_backend(__package__, args[-1]).project_mlp(*args[:-1])


@impl("lsmha_fast::norm_pool_linear")
def _norm_pool_linear_impl(*args):
    return load_backend(__package__, args[-1]).norm_pool_linear(*args[:-1])


@torch.library.register_fake("lsmha_fast::norm_linear")
def _norm_linear_fake(x, weight, bias, eps, backend):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("lsmha_fast::project_mlp")
def _project_mlp_fake(heads, x, *_):
    return x.new_empty(x.shape)


@torch.library.register_fake("lsmha_fast::norm_pool_linear")
def _norm_pool_linear_fake(x, scores, weight, bias, eps, backend):
    acc = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], weight.shape[0], dtype=acc)


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm without affine part, then a linear map: the queries, keys and values of a block.

    Inference only: it computes no gradient.

    Args:
        x: tokens, (..., C), float.
        weight: (OUT, C), with the norm's scale folded in.
        bias: (OUT,), with the norm's shift folded in.
        eps: of the norm.
        backend: "reference" or "triton" (one dtype, C <= 512); by default the fastest one.

    Returns:
        (..., OUT) in the dtype of `x`.

    Raises:
        ValueError: shapes do not fit, a gradient is asked for, or the backend does not exist.
        RuntimeError: the named backend cannot run this call.
    """
    C, OUT = x.shape[-1], len(weight)
    _expect("norm_linear", weight=(weight, (OUT, C)), bias=(bias, (OUT,)))
    tensors = [t for t in (x, weight, bias) if t is not None]
    backend = _resolve("norm_linear", backend, x, tensors)
    rows = x.reshape(-1, C).contiguous()
    out = torch.ops.lsmha_fast.norm_linear.default(
        rows, weight.contiguous(), _dense(bias), eps, backend
    )
    return out.reshape(*x.shape[:-1], OUT)


def project_mlp(
    heads: Tensor,
    x: Tensor,
    proj: Linear,
    norm: Norm,
    fc1: Linear,
    fc2: Linear,
    *,
    normed_stream: bool,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """All of a transformer block that stands behind attention: s = x + proj(heads), then the MLP.

    With n = norm(s) the result is n + fc2(gelu(fc1(n))) where the stream is normed, as in the
    published CCT (arXiv 2104.05704), and s + fc2(gelu(fc1(n))) in the standard pre-norm block.
    GELU is exact. Inference only: it computes no gradient.

    Args:
        heads: what attention gives, (..., IN), float.
        x: tokens that went into the block, (..., C).
        proj: weight (C, IN) and bias (C,) or None.
        norm: weight (C,) and bias (C,), or None twice.
        fc1: weight (HIDDEN, C) and bias (HIDDEN,) or None.
        fc2: weight (C, HIDDEN) and bias (C,) or None.
        normed_stream: which of the two forms.
        eps: of the norm.
        backend: "reference" or "triton" (one dtype, C <= 512); by default the fastest one.

    Returns:
        (..., C) in the dtype of `x`.

    Raises:
        ValueError: shapes do not fit, a gradient is asked for, or the backend does not exist.
        RuntimeError: the named backend cannot run this call.
    """
    if (norm[0] is None) != (norm[1] is None):
        raise ValueError("project_mlp: a norm has weight and bias, or none of them")
    weights = [t for pair in (proj, norm, fc1, fc2) for t in pair]
    C, IN, HIDDEN = x.shape[-1], heads.shape[-1], len(fc1[0])
    _expect(
        "project_mlp",
        heads=(heads, (*x.shape[:-1], IN)),
        proj_weight=(proj[0], (C, IN)),
        proj_bias=(proj[1], (C,)),
        norm_weight=(norm[0], (C,)),
        norm_bias=(norm[1], (C,)),
        fc1_weight=(fc1[0], (HIDDEN, C)),
        fc1_bias=(fc1[1], (HIDDEN,)),
        fc2_weight=(fc2[0], (C, HIDDEN)),
        fc2_bias=(fc2[1], (C,)),
    )
    tensors = [t for t in (x, heads, *weights) if t is not None]
    backend = _resolve("project_mlp", backend, x, tensors)
    out = torch.ops.lsmha_fast.project_mlp.default(
        heads.reshape(-1, IN).contiguous(), x.reshape(-1, C).contiguous(), *map(_dense, weights),
        normed_stream, eps, backend,
    )  # fmt: skip
    return out.reshape(x.shape)


def norm_pool_linear(
    x: Tensor,
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm without affine part, sequence pooling, a linear map: the end of CCT.

    Inference only: it computes no gradient.

    Args:
        x: tokens, (B, N, C), float. N >= 1.
        scores: score projection of the pooling, (C,).
        weight: (K, C), with the norm's scale folded in.
        bias: (K,), with the norm's shift folded in.
        eps: of the norm.
        backend: "reference" or "triton" (one dtype, C <= 512); by default the fastest one.

    Returns:
        Logits (B, K) in fp32, or fp64 for fp64 tokens.

    Raises:
        ValueError: shapes do not fit, a gradient is asked for, or the backend does not exist.
        RuntimeError: the named backend cannot run this call.
    """
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"norm_pool_linear: expected x (B, N >= 1, C), got {tuple(x.shape)}")
    C, K = x.shape[-1], len(weight)
    named = {"scores": (scores, (C,)), "weight": (weight, (K, C)), "bias": (bias, (K,))}
    _expect("norm_pool_linear", **named)
    tensors = [t for t in (x, scores, weight, bias) if t is not None]
    backend = _resolve("norm_pool_linear", backend, x, tensors)
    return torch.ops.lsmha_fast.norm_pool_linear.default(
        x.contiguous(), scores.contiguous(), weight.contiguous(), _dense(bias), eps, backend
    )


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _expect(op: str, **named: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in named.items():
        if tensor is not None and tensor.shape[-len(shape) :] != shape:
            raise ValueError(f"{op}: expected {name} {shape}, got {tuple(tensor.shape)}")


def _resolve(op: str, backend: str | None, x: Tensor, tensors: list[Tensor]) -> str:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError(f"{op}: it computes no gradient; call it under torch.no_grad()")
    return resolve_backend(op, backend, CHECKS, ORDER.get(x.device.type, ()), x, tensors)
