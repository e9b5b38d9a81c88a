"""Our kernels under `scaled_dot_product_attention`, by PyTorch's registry of flash implementations.

PyTorch 2.11 and later let a provider take over the operators behind its flash backend, here of the
CPU and of CUDA. Nothing is registered on import, and registering activates nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.attention.op import default_backend

NAME = "LSMHA"
OPS = torch.ops.lsmha_fast


def register_flash_attention() -> str:
    """Offer the kernels of this package to `scaled_dot_product_attention` of every model.

    `torch.nn.attention.activate_flash_attention_impl(name)` then switches them on and
    `restore_flash_attention_impl()` off. They take the calls for which PyTorch chooses its flash
    backend and `ops.attention` would choose a native or Triton kernel; causal calls, dropout and
    wide heads stay with PyTorch's kernel.

    Returns:
        The name, "LSMHA".

    Raises:
        RuntimeError: this PyTorch has no such registry.
    """
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is None or not hasattr(torch.library, "get_kernel"):
        raise RuntimeError(
            f"torch {torch.__version__} has no registry of flash attention implementations "
            "(torch.nn.attention.register_flash_attention_impl); use a newer torch or "
            "replace_attention(model)"
        )
    register(NAME, register_fn=_activate)
    return NAME


class _Handle:
    """Keeps the kernels in place until PyTorch's registry removes them."""

    def __init__(self, library: torch.library.Library):
        self.library: torch.library.Library | None = library

    def remove(self) -> None:
        self.library = None  # its finaliser puts the kernels back that were there before


def _activate() -> _Handle:
    library = torch.library.Library("aten", "IMPL")
    for name, key, kernel in (
        ("_scaled_dot_product_flash_attention_for_cpu", "CPU", cpu_forward),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", "CPU", cpu_backward),
        ("_scaled_dot_product_flash_attention", "CUDA", cuda_forward),
        ("_scaled_dot_product_flash_attention_backward", "CUDA", cuda_backward),
    ):
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
            library.impl(name, _or_previous(name, key, kernel), key)
    return _Handle(library)


def _or_previous(name: str, key: str, kernel: Callable) -> Callable:
    """`kernel`, and where it returns None the kernel that is there now."""
    previous = torch.library.get_kernel(f"aten::{name}", key)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def run(*args, **kwargs):
        results = kernel(*args, **kwargs)
        return previous.call_boxed(keys, *args, **kwargs) if results is None else results

    return run


def _backend(q: Tensor, dropout_p: float, is_causal: bool, mask: Tensor | None) -> str | None:
    """The kernel to take a call of PyTorch's flash backend, None to leave it where it is."""
    if dropout_p > 0 or is_causal or q.numel() == 0:
        return None
    backend = default_backend(q, None, mask)
    return backend if backend in ("cpp", "triton", "cuda") else None


def _options(q: Tensor, mask: Tensor | None, scale: float | None) -> tuple:
    """key_mask, bias, head_scale, seed, dropout_p and scale of our operators."""
    bias = None if mask is None else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return None, bias, None, None, 0.0, q.shape[3] ** -0.5 if scale is None else scale


def cpu_forward(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    """aten::_scaled_dot_product_flash_attention_for_cpu: output and log-sum-exp, or None."""
    backend = _backend(q, dropout_p, is_causal, attn_mask)
    if backend is None or k.numel() == 0:
        return None
    return OPS.attention(q, k, v, *_options(q, attn_mask, scale), backend)


def cpu_backward(do, q, k, v, o, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    """Its gradient: dq, dk and dv, or None."""
    backend = _backend(q, dropout_p, is_causal, attn_mask)
    if backend is None or k.numel() == 0:
        return None
    options = _options(q, attn_mask, scale)
    return OPS.attention_backward(do, q, k, v, *options, o, lse.contiguous(), False, backend)[:3]


def cuda_forward(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """aten::_scaled_dot_product_flash_attention: its nine results, or None."""
    results = None if return_debug_mask else cpu_forward(q, k, v, dropout_p, is_causal, scale=scale)
    if results is None:
        return None
    # the random state is only read when there is dropout
    state, unused = (torch.zeros(n, dtype=torch.uint64, device=q.device) for n in ((2,), ()))
    return (*results, None, None, q.shape[2], k.shape[2], state, unused, q.new_empty(0))


def cuda_backward(
    do, q, k, v, o, lse, _q_lengths, _k_lengths, _max_q, _max_k, dropout_p, is_causal, _seed,
    _offset, *, scale=None,
):  # fmt: skip
    """Its gradient: dq, dk and dv, or None."""
    return cpu_backward(do, q, k, v, o, lse, dropout_p, is_causal, scale=scale)
