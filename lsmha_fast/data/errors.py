"""The one error of the data layer, and imports of optional packages that fail with it."""

from __future__ import annotations

import importlib
from typing import Any


class DatasetError(ValueError):
    """A data set could not be found, read, verified or made; the message is one clear line."""


def require(module: str, purpose: str, extra: str = "data") -> Any:
    """Import an optional package, or say in one line what to install.

    Args:
        module: dotted name, for example "PIL.Image".
        purpose: what needs it, the start of the message.
        extra: the extra of this package that brings it.

    Raises:
        DatasetError: the package is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise DatasetError(
            f'{purpose} needs the package {package}: pip install "lsmha_fast[{extra}]"'
        ) from None


def one_line(error: Exception) -> str:
    """Type and text of a foreign error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
