"""The pipeline "device": timm's recipe in batched kernels on a data set that lies on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops import augment, mix_and_erase
from ..ops.augment.op import LEVELS
from .batches import normalize
from .draws import Plan, draw_plan
from .training_batches import TrainingBatches, to_device

# samples whose numbers are drawn at once: enough to hide the cost of the calls, not a pause
DRAWN = 2048


class DeviceBatches(TrainingBatches):
    """What each sample becomes depends on (seed, epoch, sample number) alone, bit for bit."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        table, noise = self._tables()
        steps = self.indices(epoch, start)
        group = max(1, DRAWN // self._batches.batch_size)
        for first in range(0, len(steps), group):
            numbers, indices = zip(*steps[first : first + group], strict=True)
            sizes = [len(i) for i in indices]
            index, *plan = self._draw(epoch, torch.cat(indices))
            rows = zip(*(t.split(sizes) for t in (index, *plan)), strict=True)
            for step, (i, crops, layers, boxes) in zip(numbers, rows, strict=True):
                mix = self.mix(epoch, step)
                x = augment(self.images, i, crops, layers, self.fill())
                x = mix_and_erase(
                    x, boxes, table, noise, weight=mix.weight, cut=mix.cut, dtype=self.target.dtype
                )
                yield x, self.soft_targets(i, mix.weight)

    def fill(self) -> list[int]:
        """The colour beyond the image: the mean, as timm rounds it."""
        return [min(255, round(255 * v)) for v in self.mean[: self.images.shape[1]]]

    def _draw(self, epoch: int, index: Tensor) -> tuple[Tensor, ...]:
        plan: Plan = draw_plan(self.config, self.seed, epoch, index, *self.images.shape[-2:])
        return tuple(to_device(t, self.target.device) for t in (index, *plan))

    def _tables(self) -> tuple[Tensor, Tensor]:
        """The normalised value of every byte (C, 256), and the noise of erased pixels (65536,)."""
        C = self.images.shape[1]
        levels = torch.arange(256, dtype=torch.uint8).expand(1, C, 1, 256)
        table = normalize(levels, self.mean[:C], self.std[:C]).view(C, 256)
        noise = normal_levels() * (self.config.erase_mode == "pixel")
        return to_device(table, self.target.device), to_device(noise, self.target.device)


def normal_levels() -> Tensor:
    """(65536,) fp32: N(0, 1) as equally likely values, its quantiles in the middle of each part.

    A table and not a formula, so that the same word gives the same bits on every device.
    """
    middle = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    return torch.special.ndtri(middle).float()
