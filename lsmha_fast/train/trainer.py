"""Model, optimiser and data of a run, and what one step and one evaluation do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Batches, ImageDataset, normalize
from ..data._hashing import make_key
from .config import TrainConfig
from .distributed import Peers
from .input import make_train_batches
from .optim import autocast, make_optimizer, pick_amp
from .schedule import config_lr

LAG = 16  # steps between two looks at a GPU's flag of a bad loss


class Diverged(ValueError):
    """The loss or a gradient is not finite; the weights are those before that step."""


class Stopped(Exception):
    """Somebody asked for a stop in the middle of an evaluation."""


class Evaluation(NamedTuple):
    """Mean cross entropy and accuracy over a split."""

    loss: float
    accuracy: float


class Trainer:
    """A run between two checkpoints.

    `epoch` counts whole epochs done, `step` the steps done of the next one. Order, augmentation
    and dropout of a step follow from (seed, epoch, step, rank) alone, so no state of a random
    generator has to be kept.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        train_set: ImageDataset,
        test_set: ImageDataset,
        device: torch.device,
        *,
        peers: Peers | None = None,
        compiled: str | None = None,
    ):
        self.config, self.model, self.device = config, model, device
        self.peers = peers or Peers()
        self.train_set = train_set
        self.batches = make_train_batches(
            config, train_set, device, self.peers.rank, self.peers.world_size
        )
        # a batch of an evaluation is also the longest wait for a stop
        test_batch = config.batch_size * (4 if device.type == "cuda" else 1)
        self.test_batches = Batches(test_set, test_batch, device=device)
        self.amp_dtype = pick_amp(config.amp, device)
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        self.peers.share_norms(model, device)
        # evaluation goes past DDP, whose forward is a meeting of all processes
        self.alone = model if compiled is None else compile_model(model, compiled, device)
        self.forward = self.peers.wrap(self.alone, device)
        self.epoch, self.step = 0, 0
        self.best, self.best_epoch, self.last = 0.0, 0, 0.0
        self.best_weights: dict[str, Tensor] = {}
        self.seconds = 0.0  # of training and evaluation, over all sessions of the run
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.bad = BadStep(device)

    @torch.no_grad()
    def try_one_image(self) -> None:
        """One forward pass, so that a backend or size that does not fit shows at once."""
        self.model.eval()
        with autocast(self.device, self.amp_dtype):
            self.model(torch.zeros_like(self.test_batches.images[:1], dtype=torch.float32))

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on exactly from here; all processes must ask together."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "loss_sums": self.peers.gather(self.loss_sum),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "last": self.last,
            "seconds": self.seconds,
            "best_weights": self.best_weights,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go back to the moment of `state()`."""
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.last, self.best_weights = state["last"], state["best_weights"]
        self.loss_sum.copy_(self.peers.scatter(state["loss_sums"]))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def steps(self) -> Iterator[int]:
        """Train what is left of the epoch; gives the number of steps done after each."""
        self.forward.train()
        for images, targets in self.batches.epoch(self.epoch, self.step):
            self.train_step(images, targets)
            self.step += 1
            yield self.step

    def train_step(self, images: Tensor, targets: Tensor) -> None:
        """One optimiser step; no number leaves the device, except to look for a bad loss.

        Args:
            images: (b, C, H, W) normalised, the rows of this process.
            targets: (b, K).

        Raises:
            Diverged: the loss of this step, or on a GPU of one of the last, is not finite.
        """
        key = make_key(self.config.seed, "dropout", self.epoch, self.step, self.peers.rank)
        torch.manual_seed(int(key) >> 1)
        lr = self.lr()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with autocast(self.device, self.amp_dtype):
            loss = F.cross_entropy(self.forward(images).float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        loss = loss.detach()
        if self.scaler.is_enabled():  # it leaves out steps of infinite gradients by itself
            self.bad.look(loss, self.step)
        else:
            self.bad.look(loss + last_gradient(self.model), self.step)
            self.optimizer.found_inf = self.bad.found  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.loss_sum += loss * len(images)
        if self.peers.world_size == 1 or self.device.type == "cpu":
            self.bad.check(self.step)  # several GPUs look together, in the session

    def lr(self) -> float:
        """Learning rate of the next step."""
        return config_lr(self.config, self.epoch, self.step / len(self.batches))

    def finish_epoch(self, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Evaluate, count the epoch as done, and return its row for metrics.jsonl.

        Raises:
            Diverged: the loss is not finite.
            Stopped: `stop` said so; the epoch is not finished.
        """
        self.bad.check_now()
        lr = config_lr(self.config, self.epoch, 1 - 1 / len(self.batches))
        test = evaluate(
            self.alone,
            self.test_batches,
            self.train_set,
            self.amp_dtype,
            peers=self.peers,
            stop=stop,
        )
        loss = self.peers.gather(self.loss_sum).sum().item() / self.batches.num_images
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum.zero_()
        self.last = test.accuracy
        if self.last > self.best or self.epoch == 1:
            self.best, self.best_epoch = self.last, self.epoch
            self._keep_as_best()
        return {
            "epoch": self.epoch,
            "lr": lr,
            "train_loss": loss,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
        }

    def _keep_as_best(self) -> None:
        self.best_weights = {k: v.cpu().clone() for k, v in self.model.state_dict().items()}

    def adopt(self, epoch: int) -> None:
        """Count `epoch` epochs as done and the model's weights, evaluated now, as their result."""
        test = evaluate(self.forward, self.test_batches, self.train_set, self.amp_dtype)
        self.epoch = self.best_epoch = epoch
        self.best = self.last = test.accuracy
        self._keep_as_best()

    def weights_are_finite(self) -> bool:
        """Whether no parameter is infinite or NaN."""
        total = sum(p.detach().double().sum() for p in self.model.parameters())
        return math.isfinite(total)


def compile_model(model: nn.Module, mode: str, device: torch.device) -> nn.Module:
    """torch.compile in one of its modes; reduce-overhead replays CUDA graphs.

    Raises:
        ValueError: a mode that needs a GPU, on another device.
    """
    if mode == "reduce-overhead" and device.type != "cuda":
        raise ValueError(f"--compile {mode} records CUDA graphs; on {device.type} use default")
    return torch.compile(model, mode=mode)  # type: ignore[return-value]


def last_gradient(model: nn.Module) -> Tensor:
    """Zero, or NaN where the last layer's gradient is not finite (on any process, after DDP)."""
    gradient = [p.grad for p in model.parameters() if p.grad is not None][-1]
    return gradient.sum(dtype=torch.float32) * 0.0


class BadStep:
    """The first step whose loss was not finite, kept on the device.

    From that step on `found` is 1, and the fused optimiser leaves every update out: the weights
    stay as they were before it, however late the host looks.

    Attributes:
        found: () fp32, 0 or 1.
        first: () int64, the step; -1 for none.
    """

    def __init__(self, device: torch.device):
        self.found = torch.zeros((), device=device)
        self.first = torch.full((), -1, device=device)
        self._copied: tuple[Tensor, torch.cuda.Event] | None = None

    def look(self, value: Tensor, step: int) -> None:
        """Note whether `value` is finite."""
        bad = ~value.isfinite()
        self.first = torch.where(bad & (self.first < 0), step, self.first)
        self.found = torch.maximum(self.found, bad.float())

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


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    stats: ImageDataset,
    amp_dtype: torch.dtype | None = None,
    *,
    peers: Peers | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Loss and accuracy of `model` in eval mode over all batches.

    Args:
        model: images (B, 3, H, W) -> logits (B, K).
        batches: uint8 images and labels, on the model's device.
        stats: the data set whose mean and std normalise the images.
        amp_dtype: autocast dtype, or None.
        peers: the processes that share the batches.
        stop: asked before every batch; True gives up.

    Raises:
        Stopped: `stop` said so.
    """
    peers = peers or Peers()
    model.eval()
    peers.same_buffers(model)
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, correct
    for i, (images, labels) in enumerate(batches):
        if stop():
            raise Stopped
        if i % peers.world_size != peers.rank:
            continue
        with autocast(device, amp_dtype):
            logits = model(normalize(images, stats.mean, stats.std)).float()
        correct = (logits.argmax(1) == labels).sum()
        sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), correct])
    loss, correct = (peers.sum(sums) / batches.num_images).tolist()
    return Evaluation(loss, correct)
