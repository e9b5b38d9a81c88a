"""Which backend runs an op: the one the caller names, else the fastest that supports the call."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .._ext import BUILD, cuda_ext_missing, ext_missing

# a check returns None when the backend supports the call, else the reason and the remedy
Check = Callable[..., "str | None"]


class BackendError(RuntimeError):
    """A backend was named that cannot run the call."""


# what the kernels of a backend need before they run
LIBRARIES = {"cpp": ext_missing, "cuda": cuda_ext_missing}


def load_backend(package: str, backend: str) -> ModuleType:
    """Import `<package>.reference` or `<package>._<backend>`; kernels load on first use.

    An exported program calls ops without the public functions and their checks, so the native
    library is loaded here, too.

    Raises:
        BackendError: the native library is missing.
    """
    if backend in LIBRARIES and (reason := LIBRARIES[backend]()) is not None:
        raise BackendError(f"{package}: backend {backend!r} cannot run this call: {reason}")
    name = "reference" if backend == "reference" else f"_{backend}"
    return importlib.import_module(f"{package}.{name}")


def resolve_backend(
    op: str, backend: str | None, checks: Mapping[str, Check], order: Sequence[str], *args
) -> str:
    """Choose a backend for one call.

    Args:
        op: public name of the op, for messages.
        backend: the caller's choice, or None.
        checks: for each backend of the op, a function of `*args` that returns None or a reason.
        order: backends to try when the caller has no wish, fastest first.
        *args: what the checks look at, usually the input tensors.

    Returns:
        The name of the backend.

    Raises:
        ValueError: `backend` is not a backend of this op.
        BackendError: the named backend cannot run this call.
    """
    if backend is None:
        for candidate in order:
            if checks[candidate](*args) is None:
                return candidate
        return "reference"
    if backend not in checks:
        raise ValueError(f"{op}: unknown backend {backend!r}; choose from {', '.join(checks)}")
    reason = checks[backend](*args)
    if reason is not None:
        raise BackendError(f"{op}: backend {backend!r} cannot run this call: {reason}")
    return backend


def impl(name: str, native: bool = False) -> Callable:
    """Register a function as the implementation of op `name` on every device, with autocast off.

    Without this the torch operations inside a backend would be cast by a caller's autocast; ops
    compute in the precision of their inputs.

    Args:
        name: of an op that is defined, with its namespace; its last argument is the backend.
        native: whether `lsmha_fast._C` has the op, see `call`; then the function is not asked for
            "cpp".
    """
    op = getattr(torch.ops.lsmha_fast, name.removeprefix("lsmha_fast::"))
    if native:
        _add_native(name, op)

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args):
            if native and args[-1] == "cpp":
                return op.cpp(*args[:-1])
            device = _device(args).type
            if not torch.is_autocast_enabled(device):
                return function(*args)
            with torch.autocast(device, enabled=False):
                return function(*args)

        torch.library.impl(name, "CompositeExplicitAutograd")(run)
        return function

    return register


def call(op: torch._ops.OpOverloadPacket, *args):
    """Run an op of the package whose last argument is the backend.

    "cpp" has an overload of its own, without that argument: the native library implements it for
    the CPU, so that no Python stands between PyTorch's dispatcher and the kernel.
    """
    return op.cpp(*args[:-1]) if args[-1] == "cpp" else op.default(*args)


def overloads(op: torch._ops.OpOverloadPacket, function: Callable) -> dict:
    """What `function`, of all arguments of an op, is for each of its overloads."""
    return {op.default: function, op.cpp: lambda *args: function(*args, "cpp")}


def _add_native(name: str, op: torch._ops.OpOverloadPacket) -> None:
    """The overload `cpp` of an op, and what answers to it where the native library does not."""
    schema = str(op.default._schema).removeprefix(name).replace(", str backend)", ")")
    torch.library.define(f"{name}.cpp", schema)

    @torch.library.impl(f"{name}.cpp", "CompositeExplicitAutograd")
    def load(*args):
        if (reason := native_missing(name, _device(args))) is not None:
            raise BackendError(f"{name}: backend 'cpp' cannot run this call: {reason}")
        return op.cpp(*args)

    torch.library.register_fake(f"{name}.cpp")(lambda *args: op.default(*args, "cpp"))


def native_missing(name: str, device: torch.device) -> str | None:
    """Load the native library; why it does not have op `name` for a device, or None."""
    if device.type != "cpu":
        return f"it needs a CPU tensor, got one on {device}"
    if (reason := ext_missing()) is not None:
        return reason
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{name}.cpp", "CPU"):
        return None
    return f"the native extension lsmha_fast._C is of an older version; {BUILD}"


def _device(args: Sequence) -> torch.device:
    return next(a.device for a in args if isinstance(a, Tensor))


def always(*_) -> None:
    """The check of a backend that supports every call."""
    return None


def triton_check(x: Tensor, dtypes: Sequence[torch.dtype]) -> str | None:
    """Reason why the Triton backend cannot take tensors like `x`, or None."""
    from ._triton_utils import INTERPRET, triton_missing

    if (missing := triton_missing()) is not None:
        return missing
    if x.device.type != "cuda" and not INTERPRET:
        return f"it needs a CUDA tensor, got one on {x.device}; use backend='reference'"
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return f"dtype {str(x.dtype).removeprefix('torch.')} is not one of {allowed}"
    if INTERPRET and x.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly; use float32 or float16 there"
    return None
