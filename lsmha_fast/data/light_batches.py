"""The pipeline "light": crop with padding, flip, erasing and mixing; for data of little variety."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._hashing import make_key
from .augment import Augment
from .batches import normalize
from .mix import mix_images
from .training_batches import TrainingBatches, to_device


class LightBatches(TrainingBatches):
    """Random numbers follow from (seed, epoch, step, rank)."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        c = self.config
        change = Augment(
            crop_padding=c.crop_padding,
            crop_fill=c.crop_fill,
            flip=c.hflip,
            erase_prob=c.erase_prob,
            erase_mode="pixel" if c.erase_mode == "pixel" else "zero",
        )
        for step, rows in self.indices(epoch, start):
            index = to_device(rows, self.target.device)
            key = make_key("light-1", self.seed, epoch, step, self.target.rank)
            generator = torch.Generator().manual_seed(int(key) >> 1)
            x = normalize(self.images.index_select(0, index), self.mean, self.std)
            mix = self.mix(epoch, step)
            x = mix_images(change(x, generator), mix)
            yield x.to(self.target.dtype), self.soft_targets(index, mix.weight)
