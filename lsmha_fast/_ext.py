"""The optional native libraries: loaded on first use, and why one is missing where it is."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BUILD = "pip install --no-build-isolation . in the source folder builds it"


def _constant(function: Callable) -> Callable:
    """Let torch.compile call a function instead of tracing the import in it."""
    # torch.compiler.assume_constant_result sets the same mark, but imports the whole compiler
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _load(name: str) -> str | None:
    try:
        importlib.import_module(f"lsmha_fast.{name}")
    except ModuleNotFoundError:
        return f"the native extension lsmha_fast.{name} is not built; {BUILD}"
    except ImportError as error:
        return f"the native extension lsmha_fast.{name} does not load ({error}); {BUILD}"
    return None


@_constant
def ext_missing() -> str | None:
    """Why the CPU kernels of `lsmha_fast._C` cannot run, with the remedy; None once loaded."""
    return _load("_C")


@_constant
def cuda_ext_missing() -> str | None:
    """Why the CUDA kernels of `lsmha_fast._C_cuda` are not there, with the remedy; None once
    loaded, for which no GPU is needed."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    return _load("_C_cuda")


@_constant
def _device_missing(index: int) -> str | None:
    """Why the CUDA kernels that were built do not run on a GPU, or None."""
    from lsmha_fast import _C_cuda  # type: ignore[attr-defined]

    major, minor = torch.cuda.get_device_capability(index)
    if runs_on(_C_cuda.architectures, major, minor):
        return None
    return (
        f"lsmha_fast._C_cuda was built for compute capability {_C_cuda.architectures}, the GPU has "
        f"{major}.{minor}; TORCH_CUDA_ARCH_LIST={major}.{minor} when building adds it"
    )


def runs_on(architectures: str, major: int, minor: int) -> bool:
    """Whether code for a `TORCH_CUDA_ARCH_LIST` such as "8.0;9.0a" runs on a GPU.

    Machine code runs on later GPUs of its major version, with an "a" on that version alone, and
    with "+PTX" on every later GPU. Names such as "Hopper" are left to the driver to judge.
    """
    for entry in re.split(r"[;\s]+", architectures.strip()):
        found = re.fullmatch(r"(\d+)\.(\d)(a|f)?(\+PTX)?", entry)
        if found is None:
            return True
        built = int(found[1]), int(found[2])
        if built == (major, minor) or (found[4] and not found[3] and built < (major, minor)):
            return True
        if found[3] != "a" and built[0] == major and built[1] < minor:
            return True
    return False


def _dtype_refused(x: Tensor, dtypes: Sequence[torch.dtype]) -> str:
    allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
    return f"dtype {str(x.dtype).removeprefix('torch.')} is not one of {allowed}"


def cpp_check(x: Tensor, dtypes: Sequence[torch.dtype]) -> str | None:
    """Reason why the native CPU kernels cannot take tensors like `x`, or None."""
    if not x.is_cpu:
        return f"it needs a CPU tensor, got one on {x.device}"
    return ext_missing() if x.dtype in dtypes else _dtype_refused(x, dtypes)


def cuda_check(x: Tensor, dtypes: Sequence[torch.dtype]) -> str | None:
    """Reason why the native CUDA kernels cannot take tensors like `x`, or None."""
    if x.device.type != "cuda":
        return f"it needs a CUDA tensor, got one on {x.device}"
    if x.dtype not in dtypes:
        return _dtype_refused(x, dtypes)
    return cuda_ext_missing() or _device_missing(x.device.index)


def status() -> dict[str, str]:
    """For `lsmha info`: each native library and "loaded" or the reason why not."""
    return {
        "lsmha_fast._C": ext_missing() or "loaded",
        "lsmha_fast._C_cuda": cuda_ext_missing() or "loaded",
    }
