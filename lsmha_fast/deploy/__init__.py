"""Inference: exact folding, packed weights, a thread-safe runner, measurements and export."""

from .optimize import optimize as optimize
from .runner import Runner as Runner
