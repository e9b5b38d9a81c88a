"""Names of a package that load on first use (PEP 562)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType


def lazy_exports(package: str, homes: dict[str, str]) -> tuple[Callable[[str], object], Callable]:
    """Make `__getattr__` and `__dir__` for a package.

    Args:
        package: its `__name__`.
        homes: exported name -> submodule that holds it, or "" where the name is a submodule.
    """

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module: ModuleType = importlib.import_module(f"{package}.{homes[name] or name}")
        return getattr(module, name) if homes[name] else module

    return load, lambda: sorted(homes)
