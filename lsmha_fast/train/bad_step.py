"""The flag of a loss that is not finite, which the host need not wait for."""

from __future__ import annotations

import torch
from torch import Tensor

LAG = 16  # steps between two looks at a GPU's flag


class Diverged(ValueError):
    """The loss or a gradient is not finite; the weights are those before that step."""


class BadStep:
    """The first step whose loss was not finite, kept on the device.

    From that step on `found` is 1, and the fused optimiser leaves every update out: the weights
    stay as they were before it, however late the host looks.

    Attributes:
        found: () fp32, 0 or 1.
        first: () int64, the step; -1 for none.
        step: () int64, the step that `look` is about.
    """

    def __init__(self, device: torch.device):
        self.found = torch.zeros((), device=device)
        self.first = torch.full((), -1, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self._copied: tuple[Tensor, torch.cuda.Event] | None = None

    def look(self, value: Tensor) -> None:
        """Note whether `value` is finite, in place: a graph records where the tensors lie."""
        bad = ~value.isfinite()
        self.first.copy_(torch.where(bad & (self.first < 0), self.step, self.first))
        self.found.copy_(torch.maximum(self.found, bad.float()))

    def check(self, step: int) -> None:
        """Raise `Diverged` if the flag is up; on a GPU look at an old copy of it, now and then."""
        if self.first.device.type == "cpu":
            self.check_now()
        elif self._copied is not None and self._copied[1].query():
            self._raise(self._copied[0])
            self._copied = None
        elif self._copied is None and step % LAG == 0:
            pinned = torch.empty_like(self.first, device="cpu", pin_memory=True)
            pinned.copy_(self.first, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._copied = pinned, event

    def check_now(self) -> None:
        """Raise `Diverged` if the flag is up, waiting for the device."""
        self._raise(self.first)

    def _raise(self, first: Tensor) -> None:
        if (step := int(first)) >= 0:
            raise Diverged(step)
