"""Triton helpers with two callers or more. Importing this file does not import Triton."""

from __future__ import annotations

import importlib.util
import os

# read once, as Triton itself does when it is first imported
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


# looked up once; finding a spec does not import Triton
_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_missing() -> str | None:
    """Why Triton cannot be used at all, or None."""
    return None if _INSTALLED else "Triton is not installed (pip install triton)"


def next_pow2(n: int) -> int:
    """The smallest power of two that is at least `n` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()
