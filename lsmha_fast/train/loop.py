"""Train a model and leave a run folder that says all about it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Batches, ImageDataset, default_augment, mixup_cutmix, normalize
from .checkpoint import load_state, save_state, save_weights
from .config import TrainConfig
from .run import (
    STATE,
    WEIGHTS,
    append_metrics,
    build_model,
    create_run,
    keep_metrics,
    load_split,
    pick_device,
    read_config,
)
from .schedule import cosine_lr


class RunResult(NamedTuple):
    """Where the run is, and its test accuracies in 0..1."""

    folder: Path
    best_accuracy: float
    best_epoch: int
    last_accuracy: float
    seconds: float


class Evaluation(NamedTuple):
    """Mean cross entropy and accuracy over a split."""

    loss: float
    accuracy: float


def train(config: TrainConfig, folder: Path, *, resume: bool = False) -> RunResult:
    """Train, evaluate after every epoch, and keep the run resumable at every moment.

    Every epoch's order, augmentation and dropout follow from (seed, epoch), so an interrupted
    and resumed run gives the bits of an uninterrupted one on the same device.

    Args:
        config: what to train; ignored when resuming, where the run's own config is read.
        folder: the run folder, new unless `resume`.
        resume: go on from the last whole epoch in `folder`.

    Raises:
        ValueError: bad data, model or folder.
        KeyboardInterrupt: after Ctrl-C; the folder can be resumed.
    """
    if resume:
        config = replace(read_config(folder), device=config.device)
    device = pick_device(config.device)
    train_set, test_set = load_split(config, "train"), load_split(config, "test")
    model = build_model(config, len(train_set.class_names)).to(device)
    trainer = Trainer(config, model, train_set, test_set, device)
    trainer.try_one_image()  # what cannot run shall fail before anything is written
    if resume:
        trainer.load(load_state(folder / STATE))
        keep_metrics(folder, trainer.epoch)
    else:
        create_run(folder, config)
        save_state(folder / STATE, trainer.state())
    start = time.perf_counter()
    while trainer.epoch < config.epochs:
        row = trainer.run_epoch()
        if trainer.last > trainer.best or trainer.epoch == 1:
            trainer.best, trainer.best_epoch = trainer.last, trainer.epoch
            save_weights(folder / WEIGHTS["best"], model.state_dict())
        append_metrics(folder, row)
        save_weights(folder / WEIGHTS["last"], model.state_dict())
        save_state(folder / STATE, trainer.state())
    seconds = time.perf_counter() - start
    return RunResult(folder, trainer.best, trainer.best_epoch, trainer.last, seconds)


def write_run(config: TrainConfig, folder: Path, model: nn.Module, *, epoch: int) -> RunResult:
    """Make a run of weights that were not trained in it, which `train` with `resume` goes on with.

    Args:
        config: of the run; its sizes are those of `model`.
        folder: new or empty.
        model: on any device; moved to the config's.
        epoch: whole epochs that count as done; 0 for a run that is still to be trained.

    Raises:
        ValueError: bad data or folder.
    """
    device = pick_device(config.device)
    train_set, test_set = load_split(config, "train"), load_split(config, "test")
    trainer = Trainer(config, model.to(device), train_set, test_set, device)
    accuracy = evaluate(model, trainer.test_batches, train_set, trainer.amp_dtype).accuracy
    trainer.epoch = trainer.best_epoch = epoch
    trainer.best = trainer.last = accuracy
    create_run(folder, config)
    for name in WEIGHTS.values():
        save_weights(folder / name, model.state_dict())
    save_state(folder / STATE, trainer.state())
    return RunResult(folder, accuracy, epoch, accuracy, 0.0)


class Trainer:
    """Model, optimiser and data of a run; `epoch` counts whole epochs done."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        train_set: ImageDataset,
        test_set: ImageDataset,
        device: torch.device,
    ):
        self.config, self.model, self.device = config, model, device
        self.train_set = train_set
        self.num_classes = len(train_set.class_names)
        self.batches = Batches(
            train_set, config.batch_size, shuffle=True, seed=config.seed, device=device
        )
        self.test_batches = Batches(test_set, 4 * config.batch_size, shuffle=False, device=device)
        self.augment = None
        if config.augment:
            self.augment = replace(default_augment(config.data), erase_prob=config.erase)
        self.optimizer = make_optimizer(model, config, device)
        self.amp_dtype = pick_amp(config.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        self.epoch, self.best, self.best_epoch, self.last = 0, 0.0, 0, 0.0

    @torch.no_grad()
    def try_one_image(self) -> None:
        """One forward pass, so that a backend or size that does not fit shows at once."""
        self.model.eval()
        with autocast(self.device, self.amp_dtype):
            self.model(torch.zeros_like(self.batches.images[:1], dtype=torch.float32))

    def state(self) -> dict:
        """What `load` needs to go on exactly from here."""
        return {
            "epoch": self.epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "last": self.last,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict) -> None:
        """Go back to the moment of `state()`."""
        self.epoch, self.best = state["epoch"], state["best"]
        self.best_epoch, self.last = state["best_epoch"], state["last"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def run_epoch(self) -> dict:
        """Train one epoch, evaluate, and return the row for metrics.jsonl."""
        start = time.perf_counter()
        # dropout and augmentation of an epoch depend on nothing before it
        torch.manual_seed(self.config.seed * 1_000_003 + self.epoch + 1)
        # on the CPU, so that drawing numbers never waits for the device
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.epoch + 1)
        self.model.train()
        total = torch.zeros((), device=self.device)
        for step, (images, labels) in enumerate(self._progress()):
            lr = self._set_lr(self.epoch + step / len(self.batches))
            total += self._step(images, labels, generator) * len(labels)
        train_seconds = time.perf_counter() - start
        loss = total.item() / self.batches.num_images
        if not loss < float("inf"):
            raise ValueError(
                f"the training loss became {loss} in epoch {self.epoch + 1}; "
                f"a lower --lr (now {self.config.lr}) usually helps"
            )
        test = evaluate(self.model, self.test_batches, self.train_set, self.amp_dtype)
        self.epoch += 1
        self.last = test.accuracy
        return {
            "epoch": self.epoch,
            "lr": lr,
            "train_loss": loss,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "train_images_per_s": self.batches.num_images / train_seconds,
            "seconds": time.perf_counter() - start,
        }

    def _step(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """One optimiser step; the loss stays on the device."""
        config = self.config
        x = normalize(images, self.train_set.mean, self.train_set.std)
        if self.augment is not None:
            x = self.augment(x, generator)
        x, targets = mixup_cutmix(
            x,
            labels,
            self.num_classes,
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            smoothing=config.label_smoothing,
            generator=generator,
        )
        with autocast(self.device, self.amp_dtype):
            loss = F.cross_entropy(self.model(x).float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _set_lr(self, epoch: float) -> float:
        c = self.config
        lr = cosine_lr(
            epoch,
            epochs=c.epochs,
            lr=c.lr,
            min_lr=c.min_lr,
            warmup_lr=c.warmup_lr,
            warmup_epochs=c.warmup_epochs,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _progress(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of this epoch behind a bar that is silent off a terminal."""
        from tqdm import tqdm

        done = f"best {100 * self.best:.1f} %" if self.epoch else "starting"
        return tqdm(
            self.batches.epoch(self.epoch),
            total=len(self.batches),
            desc=f"epoch {self.epoch + 1}/{self.config.epochs} ({done})",
            disable=None,
            leave=False,
        )


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device):
    """AdamW; vectors (biases, norms) are not decayed, as in timm and the published recipe."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def pick_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None for full precision.

    Raises:
        ValueError: fp16 without a GPU.
    """
    if amp == "fp16" and device.type != "cuda":
        raise ValueError(f"--amp fp16 needs a GPU; on {device.type} use bf16 or off")
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" else "off"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def autocast(device: torch.device, dtype: torch.dtype | None):
    """Autocast on `device`, or nothing for None."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, stats: ImageDataset, amp_dtype: torch.dtype | None = None
) -> Evaluation:
    """Loss and accuracy of `model` in eval mode over all batches.

    Args:
        model: images (B, 3, H, W) -> logits (B, K).
        batches: uint8 images and labels, on the model's device.
        stats: the data set whose mean and std normalise the images.
        amp_dtype: autocast dtype, or None.
    """
    model.eval()
    device = next(model.parameters()).device
    loss, correct = torch.zeros(2, dtype=torch.float64, device=device)
    for images, labels in batches:
        with autocast(device, amp_dtype):
            logits = model(normalize(images, stats.mean, stats.std)).float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    count = batches.num_images
    return Evaluation(loss.item() / count, correct.item() / count)
