"""Reading the pickles of CIFAR-100's python layout without ever running what they ask for.

A pickle is a program: it names functions and calls them. Here every name it may use stands for an
inert class of this file, so the worst a crafted file can do is to be refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np

from .errors import DatasetError, one_line

_MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}


class _Array:
    """Stands for numpy's array and its constructor; keeps the state it is given."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype:
    """Stands for numpy.dtype; keeps the type code."""

    def __init__(self, code: Any, *flags: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


class _Encode:
    """Stands for `_codecs.encode`, through which Python 3 writes bytes in protocol 2."""

    def __new__(cls, text: str, encoding: str = "latin1") -> Any:
        return text.encode("latin1")

    def __setstate__(self, state: Any) -> None:
        pass


_ADMITTED = {
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise DatasetError(f"the pickle asks for {module}.{name}, which is refused") from None


def safe_load(data: bytes) -> Any:
    """Unpickle plain containers, numbers, strings and uint8 arrays (see `to_uint8`).

    Raises:
        DatasetError: the pickle names anything else, or is broken.
    """
    try:
        _check_memo(data)
        return _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except DatasetError:
        raise
    except Exception as error:  # a crafted stream can raise anything
        raise DatasetError(f"broken pickle: {one_line(error)}") from None


def to_uint8(value: Any) -> np.ndarray:
    """The array that an unpickled stand-in describes.

    Raises:
        DatasetError: not an array of bytes in C order whose size fits its shape.
    """
    try:
        _, shape, dtype, fortran_order, raw = value.state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        fits = dtype.code in ("u1", "|u1") and not fortran_order and len(raw) == math.prod(shape)
        if fits:
            return np.frombuffer(raw, dtype=np.uint8).reshape(shape)
    except (AttributeError, TypeError, ValueError):
        pass
    raise DatasetError("the pickle's data are not a uint8 array in C order")


def _check_memo(data: bytes) -> None:
    """Refuse memo numbers beyond the file's length: the unpickler allocates that many slots."""
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _MEMO_OPCODES and int(argument) > len(data):
            raise DatasetError(f"broken pickle: memo number {argument} in {len(data)} bytes")
