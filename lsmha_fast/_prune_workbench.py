"""What `lsmha prune` works with: a run, its images, and accuracy, cost and time of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ._prune_options import PruneOptions
from ._shp_command import NormalizedBatches
from .analysis.cost import count_macs, interleaved_medians
from .data import Batches, ImageDataset, normalize
from .models import CCT
from .nn import EncoderBlock
from .train.config import TrainConfig
from .train.evaluation import evaluate
from .train.loop import train, write_run
from .train.run import Run, load_run, load_split, pick_device

# one training image in so many is kept from the probes, to measure SHP on
HELD_OUT = 5


class Workbench:
    """A run with the images to choose on and those to measure on, and what is measured there."""

    def __init__(self, run: Run, options: PruneOptions):
        self.options, self.model = options, run.model
        self.config = run.config
        if options.data_root is not None:
            self.config = replace(self.config, data_root=options.data_root)
        self.device = pick_device(options.device)
        self.config = replace(self.config, device=str(self.device))
        self.model.to(self.device)
        self.train_set = load_split(self.config, "train")
        self.test_set = load_split(self.config, "test")
        sets = {"train": self.train_set, "test": self.test_set}
        self.measured = sets[options.split]
        if options.choice_split == "train":
            held = torch.arange(len(self.train_set)) % HELD_OUT == 0
            self.probe_set, self.choice = (self.train_set.part(which) for which in (~held, held))
            self.choice_name = f"every {HELD_OUT}th image of train"
        else:
            self.probe_set, self.choice = self.train_set, self.test_set
            self.choice_name = "test"

    def batches(self, dataset: ImageDataset, *, shuffle: bool) -> NormalizedBatches:
        """Normalised batches on the device."""
        return NormalizedBatches(dataset, self.options.batch_size, self.device, shuffle=shuffle)

    def accuracy(self, model: CCT, dataset: ImageDataset | None = None) -> float:
        """Of a model on the measured split, or on another data set."""
        dataset = self.measured if dataset is None else dataset
        batches = Batches(dataset, self.options.batch_size, device=self.device)
        return evaluate(model, batches, dataset).accuracy

    def macs(self, model: CCT) -> int:
        """Of one image."""
        return count_macs(model, self._images(1))

    @torch.no_grad()
    def milliseconds(self, models: Sequence[CCT]) -> list[float]:
        """Median of one batch for every model, the models taking turns."""
        images = self._images(self.options.timing_batch)
        calls = [lambda m=m.eval(): m(images) for m in models]  # type: ignore[misc]
        seconds = interleaved_medians(calls, rounds=self.options.timing_rounds, device=self.device)
        return [1000 * s for s in seconds]

    def finetuned(self, model: CCT, folder: Path) -> float:
        """Train a pruned model in a new run folder; its accuracy on the measured split after."""
        config = finetune_config(pruned_config(self.config, model), self.options)
        write_run(config, folder, model, epoch=0)
        train(config, folder, resume=True)
        return self.accuracy(load_run(folder, "last").model.to(self.device))

    def _images(self, count: int) -> torch.Tensor:
        some = self.measured.images[torch.arange(count) % len(self.measured)].to(self.device)
        return normalize(some, self.measured.mean, self.measured.std)


def pruned_config(config: TrainConfig, model: CCT) -> TrainConfig:
    """The config whose `build_model` makes a model of the same sizes as `model`."""
    blocks = [block for block in model.blocks if isinstance(block, EncoderBlock)]
    return replace(
        config,
        num_heads=tuple(b.self_attn.num_heads for b in blocks),
        head_dim=tuple(b.self_attn.head_dim for b in blocks),
        mlp_hidden=tuple(b.linear1.out_features for b in blocks),
    )


def finetune_config(config: TrainConfig, options: PruneOptions) -> TrainConfig:
    """The run's recipe, shorter, from a tenth of its learning rate, without warm-up."""
    lr = config.lr / 10 if options.finetune_lr is None else options.finetune_lr
    return replace(
        config,
        epochs=options.finetune_epochs,
        lr=lr,
        min_lr=min(config.min_lr, lr),
        warmup_epochs=0.0,
    )
