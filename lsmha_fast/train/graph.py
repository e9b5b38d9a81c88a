"""CUDA graphs of what a run does over and over: a launch for the whole step instead of hundreds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# calls before the recording: kernels are compiled and chosen in the first, and memory is laid out
WARM_UP = 3


class Recording(NamedTuple):
    """A recorded call: `replay` runs it again on the same memory, where `output` changes."""

    replay: Callable[[], None]
    output: Any


class Graphed:
    """A function of GPU tensors that is recorded once and then replayed.

    The first shapes it is called with count: the calls after `WARM_UP` of them are replays, calls
    with other shapes (the last batch of an epoch) run as they are. The function may read and change
    any tensors that stay where they are; whatever else it reads is read once, when it is recorded.
    Random numbers are drawn anew in every replay, as the generator's seed says.

    Args:
        function: of tensors, to a tensor, a tuple of tensors or nothing.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._inputs: tuple[Tensor, ...] = ()
        self._calls = 0
        self._recording: Recording | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        """What the function gives; from a replay, tensors that the next one overwrites."""
        if not self._calls:
            self._inputs = tuple(t.clone() for t in inputs)
        if any(
            t.shape != kept.shape or t.dtype != kept.dtype
            for t, kept in zip(inputs, self._inputs, strict=True)
        ):
            return self._function(*inputs)
        self._calls += 1
        if self._calls <= WARM_UP:
            with _side_stream(inputs[0].device):
                return self._function(*inputs)
        for kept, t in zip(self._inputs, inputs, strict=True):
            kept.copy_(t)
        if self._recording is None:
            self._recording = record_cuda_graph(lambda: self._function(*self._inputs))
        self._recording.replay()
        return self._recording.output


def record_cuda_graph(function: Callable[[], Any]) -> Recording:
    """Record the kernels of a call, in a memory pool of their own, without running them."""
    graph = torch.cuda.CUDAGraph()
    # threads that load data go on with their own copies meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = function()
    return Recording(graph.replay, output)


@contextlib.contextmanager
def _side_stream(device: torch.device):
    """Work on another stream than the default one, on which nothing can be recorded later."""
    if device.type != "cuda":
        yield
        return
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)
