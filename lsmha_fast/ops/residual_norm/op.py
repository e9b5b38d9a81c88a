"""Residual, stochastic depth and LayerNorm in one pass: public function, schema, autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._ext import cpp_check
from .._dispatch import always, impl, load_backend, resolve_backend, triton_check
from . import reference
from .common import accumulator, has_own_stream, stream_dtype

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# the widest row that a Triton program holds in its registers
TRITON_CHANNELS = 4096
# numbers below which the calls around a kernel cost more than it saves on a CPU
CPU_SMALL = 1 << 17


def _triton_check(x, branch, dtype):
    if x.shape[-1] > TRITON_CHANNELS:
        return f"it takes at most {TRITON_CHANNELS} channels, got {x.shape[-1]}"
    return _every(lambda t: triton_check(t, FLOATS), x, branch, dtype)


def _cpp_check(x, branch, dtype):
    return _every(lambda t: cpp_check(t, (torch.float32, torch.bfloat16)), x, branch, dtype)


def _every(check, x, branch, dtype):
    """The first reason why not, of those for x, branch and the result."""
    tensors = (x, x if branch is None else branch, x.new_empty(0, dtype=dtype))
    return next(filter(None, map(check, tensors)), None)


CHECKS = {"reference": always, "triton": _triton_check, "cpp": _cpp_check}

# by device, fastest first; Triton's interpreter is for tests that name it
ORDER = {"cuda": ("triton",), "cpu": ("cpp",)}

torch.library.define(
    "lsmha_fast::residual_norm",
    "(Tensor x, Tensor? branch, Tensor? keep, Tensor? weight, Tensor? bias, float eps,"
    " bool post_norm, ScalarType dtype, str backend)"
    " -> (Tensor stream, Tensor y, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "lsmha_fast::residual_norm_backward",
    "(Tensor dy, Tensor? dstream, Tensor x, Tensor? branch, Tensor? keep, Tensor? weight,"
    " Tensor mean, Tensor rstd, bool post_norm, ScalarType dtype, ScalarType? branch_dtype,"
    " bool need_parameters, str backend)"
    " -> (Tensor dx, Tensor dbranch, Tensor dweight, Tensor dbias)",
)


@impl("lsmha_fast::residual_norm")
def _forward_impl(*args):
    *inputs, backend = args
    return load_backend(__package__, backend).residual_norm(*inputs)


@impl("lsmha_fast::residual_norm_backward")
def _backward_impl(*args):
    *inputs, backend = args
    return load_backend(__package__, backend).residual_norm_backward(*inputs)


@torch.library.register_fake("lsmha_fast::residual_norm")
def _forward_fake(x, branch, keep, weight, bias, eps, post_norm, dtype, backend):
    own = has_own_stream(x, branch, post_norm, dtype)
    stream = x.new_empty(x.shape if own else (0,), dtype=stream_dtype(x, branch))
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=accumulator(x, branch)) for _ in range(2))
    return stream, x.new_empty(x.shape, dtype=dtype), mean, rstd


@torch.library.register_fake("lsmha_fast::residual_norm_backward")
def _backward_fake(dy, dstream, x, branch, keep, weight, mean, rstd, post_norm, dtype, *rest):
    branch_dtype, need_parameters, _ = rest
    dbranch = (
        mean.new_empty(0) if branch_dtype is None else x.new_empty(x.shape, dtype=branch_dtype)
    )
    dweight, dbias = (mean.new_empty(x.shape[-1] if need_parameters else 0) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), dbranch, dweight, dbias


_forward = torch.ops.lsmha_fast.residual_norm.default
_backward = torch.ops.lsmha_fast.residual_norm_backward.default


class _ResidualNorm(torch.autograd.Function):
    """(x, branch, keep, weight, bias, eps, post_norm, dtype, backend) -> stream, y.

    A stream that is `x` or y itself is returned as a view, so that both gradients arrive here and
    are added in the kernel, not in a pass over memory.
    """

    @staticmethod
    def forward(ctx, x, branch, keep, weight, bias, eps, post_norm, dtype, backend):
        stream, y, mean, rstd = _forward(
            x, branch, keep, weight, bias, eps, post_norm, dtype, backend
        )
        if not has_own_stream(x, branch, post_norm, dtype):
            stream = (y if post_norm else x).view(x.shape)
        # the sum is kept only where it is written anyway
        inputs = (x, branch) if post_norm or branch is None else (stream, None)
        ctx.save_for_backward(*inputs, keep, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.post_norm, ctx.backend = post_norm, backend
        ctx.dtypes = [None if t is None else t.dtype for t in (x, branch, weight, bias)]
        return stream, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dstream, dy):
        if dstream is None and dy is None:
            return (None,) * 9
        x, branch, keep, weight, mean, rstd = ctx.saved_tensors
        dtype, branch_dtype, *parameter_dtypes = ctx.dtypes
        _, need_branch, _, *need_parameters = ctx.needs_input_grad[:5]
        # without a factor the branch has the gradient of x
        same = keep is None and branch_dtype == dtype
        if dy is None:
            dy = torch.zeros_like(dstream)
        dx, dbranch, *dparameters = _backward(
            dy, dstream, x, branch, keep, weight, mean, rstd, ctx.post_norm, dtype,
            branch_dtype if need_branch and not same else None, any(need_parameters), ctx.backend,
        )  # fmt: skip
        dweight, dbias = (
            d.to(t) if needed else None
            for d, t, needed in zip(dparameters, parameter_dtypes, need_parameters, strict=True)
        )
        dbranch = None if not need_branch else dx if same else dbranch
        return dx, dbranch, None, dweight, dbias, None, None, None, None


def residual_norm(
    x: Tensor,
    branch: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    eps: float = 1e-5,
    post_norm: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum, in one pass over memory.

        s = x + keep * branch
        y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias        over the channels of a token

    Computed in fp32, fp64 for fp64 tensors; y is that of s as it is returned. Deterministic: the
    gradients of `weight` and `bias` are added in an order that depends on the shape alone.

    Where no backend is named, the definition in standard operators stands in its place while
    torch.compile, torch.export or torch.func trace the call, as compilers fuse it with its
    neighbours, and on a CPU where PyTorch's own kernels are as fast: small tensors, and all fp32.

    Args:
        x: the residual stream, (B, ..., C), float; any strides. C >= 1.
        branch: what is added to it, shaped like `x`, float; None adds nothing.
        weight, bias: of the LayerNorm, (C,) each, or None.
        keep: factor of every sample's branch, (B,), float: 0 or 1 / (1 - p) for stochastic depth
            (arXiv 1603.09382). It gets no gradient.
        eps: added to the variance.
        post_norm: the stream goes on with y, as in the published CCT; otherwise with s.
        dtype: of y; by default that of the stream. Under autocast its dtype saves the next matrix
            product a pass that casts.
        backend: "reference", "triton" or "cpp"; by default the fastest one for `x.device`.

    Returns:
        (stream, y), (B, ..., C). The stream is s, or with `post_norm` y, in the dtype of
        `x + branch`. Where it would equal `x` or y in every bit it shares its memory: change
        neither in place.

    Raises:
        ValueError: shapes do not fit, `keep` requires a gradient, or the backend does not exist.
        RuntimeError: the named backend cannot run this call.
    """
    _check(x, branch, weight, bias, keep)
    dtype = stream_dtype(x, branch) if dtype is None else dtype
    if backend is None and (_is_traced() or _suits_torch(x, branch, dtype)):
        arguments = x, branch, keep, weight, bias, eps, post_norm, dtype
        return reference.definition(*arguments)[:2]
    order = ORDER.get(x.device.type, ())
    backend = resolve_backend("residual_norm", backend, CHECKS, order, x, branch, dtype)
    return _ResidualNorm.apply(x, branch, keep, weight, bias, eps, post_norm, dtype, backend)


def _suits_torch(x: Tensor, branch: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether PyTorch's own kernels are as fast or faster; docs/kernels.md has the numbers."""
    if x.device.type != "cpu":
        return False
    all_fp32 = stream_dtype(x, branch) == x.dtype == dtype == torch.float32
    return x.numel() < CPU_SMALL or (all_fp32 and (branch is None or branch.dtype == dtype))


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _check(x, branch, weight, bias, keep):
    C = x.shape[-1] if x.ndim else 0
    fits = (
        x.ndim >= 2
        and C >= 1
        and x.is_floating_point()
        and (branch is None or branch.shape == x.shape)
        and (keep is None or keep.shape == x.shape[:1])
        and all(t is None or t.shape == (C,) for t in (weight, bias))
    )
    if not fits:
        given = {"x": x, "branch": branch, "weight": weight, "bias": bias, "keep": keep}
        shown = ", ".join(f"{k} {tuple(t.shape)}" for k, t in given.items() if t is not None)
        raise ValueError(
            "residual_norm: expected float x (B, ..., C >= 1), branch like x, weight and bias (C,) "
            f"and keep (B,), got {shown}"
        )
    if keep is not None and keep.requires_grad:
        raise ValueError("residual_norm: keep gets no gradient, but it requires one")
