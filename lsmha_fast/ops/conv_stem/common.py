"""Sizes that the op and all its backends agree on."""

from __future__ import annotations


def window_count(size: int, kernel: int, stride: int, padding: int) -> int:
    """How many windows of a convolution or a pooling fit along one side of an image."""
    return (size + 2 * padding - kernel) // stride + 1
