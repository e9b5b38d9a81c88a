"""The optional native library: loaded on first use, and why it is missing where it is."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

BUILD = "pip install --no-build-isolation . in the source folder builds it"


@functools.cache
def _load() -> str | None:
    try:
        importlib.import_module("lsmha_fast._C")
    except ModuleNotFoundError:
        return f"the native extension lsmha_fast._C is not built; {BUILD}"
    except ImportError as error:
        return f"the native extension lsmha_fast._C does not load ({error}); {BUILD}"
    return None


def ext_missing() -> str | None:
    """Why the CPU kernels of `lsmha_fast._C` cannot run, with the remedy; None once loaded."""
    return _load()


# torch.compile then calls it instead of tracing the import. torch.compiler.assume_constant_result
# sets the same mark, but imports the whole compiler to do so
ext_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cpp_check(x: Tensor, dtypes: Sequence[torch.dtype]) -> str | None:
    """Reason why the native CPU kernels cannot take tensors like `x`, or None."""
    if x.device.type != "cpu":
        return f"it needs a CPU tensor, got one on {x.device}"
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return f"dtype {str(x.dtype).removeprefix('torch.')} is not one of {allowed}"
    return ext_missing()


def status() -> dict[str, str]:
    """For `lsmha info`: each native library and "loaded" or the reason why not."""
    return {"lsmha_fast._C": ext_missing() or "loaded"}
