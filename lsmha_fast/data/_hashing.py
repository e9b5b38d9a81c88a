"""Random integers as a pure function of (key, index, draw): no state, so any subset or order of
samples gets the same numbers, on every machine (64-bit integer arithmetic only).

The mixing function is SplitMix64's (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def make_key(*parts: object) -> np.uint64:
    """A 64-bit key from anything with a stable `str`: version, seed, split."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return np.uint64(int.from_bytes(hashlib.sha256(text).digest()[:8], "little"))


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on a uint64 array."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SampleDraws:
    """Random numbers for many samples at once; every call continues each sample's own sequence.

    Args:
        key: from `make_key`.
        index: (M,) non-negative sample numbers.
    """

    def __init__(self, key: np.uint64, index: np.ndarray) -> None:
        self._base = mix64((index.astype(np.uint64) + np.uint64(1)) * _GOLDEN + key)
        self._used = 0

    def integers(self, low: int, high: int, *shape: int) -> np.ndarray:
        """(M, *shape) int32 in [low, high], both ends included."""
        words = self.words(*shape) >> np.uint64(32)
        values = (words * np.uint64(high - low + 1)) >> np.uint64(32)
        return values.astype(np.int32) + np.int32(low)

    def words(self, *shape: int) -> np.ndarray:
        """(M, *shape) uint64."""
        count = math.prod(shape)
        step = np.arange(self._used + 1, self._used + count + 1, dtype=np.uint64) * _GOLDEN
        self._used += count
        return mix64(self._base[:, None] + step).reshape(len(self._base), *shape)

    def uniform(self, *shape: int) -> np.ndarray:
        """(M, *shape) fp64 in [0, 1)."""
        return (self.words(*shape) >> np.uint64(11)) * 2.0**-53

    def normal(self, *shape: int) -> np.ndarray:
        """(M, *shape) fp64 of N(0, 1), by Box and Muller."""
        radius, angle = 1 - self.uniform(*shape), self.uniform(*shape)
        return np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
