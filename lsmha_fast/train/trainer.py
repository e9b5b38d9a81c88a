"""Model, optimiser and data of a run, and what one step and one evaluation do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Batches, ImageDataset
from ..data._hashing import make_key
from .bad_step import BadStep
from .config import TrainConfig
from .distributed import Peers
from .evaluation import evaluate, logits_of
from .graph import Graphed
from .input import make_train_batches
from .optim import autocast, make_optimizer, pick_amp
from .schedule import config_lr


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
        graphed: bool = False,
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
        # tensors, so that a recorded step reads them anew; a CPU's optimiser takes the fp64 number
        exact = torch.float32 if device.type == "cuda" else torch.float64
        self.lr_now = torch.zeros((), dtype=exact, device=device)
        self.optimizer = make_optimizer(model, config, self.lr_now)
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
        self.device_step: Callable[[Tensor, Tensor], None] = self._device_step
        self.predict: Callable[[Tensor], Tensor] = partial(logits_of, self.alone, self.amp_dtype)
        if graphed:
            check_graph(self.peers, self.scaler, compiled, device)
            self.device_step, self.predict = Graphed(self._device_step), Graphed(self.predict)

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
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_now
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
        self.lr_now.fill_(self.lr())
        self.bad.step.fill_(self.step)
        self.device_step(images, targets)
        if self.peers.world_size == 1 or self.device.type == "cpu":
            self.bad.check(self.step)  # several GPUs look together, in the session

    def _device_step(self, images: Tensor, targets: Tensor) -> None:
        """The part of a step that a CUDA graph can record: all numbers of it are tensors."""
        with autocast(self.device, self.amp_dtype):
            loss = F.cross_entropy(self.forward(images).float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        loss = loss.detach()
        if self.scaler.is_enabled():  # it leaves out steps of infinite gradients by itself
            self.bad.look(loss)
        else:
            self.bad.look(loss + last_gradient(self.model))
            self.optimizer.found_inf = self.bad.found  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.loss_sum += loss * len(images)

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
            predict=self.predict,
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


def check_graph(
    peers: Peers, scaler: torch.amp.GradScaler, compiled: str | None, device: torch.device
) -> None:
    """Refuse `--cuda-graph` where no graph can be recorded.

    Raises:
        ValueError: no GPU, several processes, fp16, or a compiler that records its own graphs.
    """
    reasons = {
        f"--device {device.type}": device.type != "cuda",
        f"{peers.world_size} processes": peers.world_size > 1,
        "--amp fp16": scaler.is_enabled(),
        f"--compile {compiled}": compiled not in (None, "default"),
    }
    for reason, refused in reasons.items():
        if refused:
            raise ValueError(f"--cuda-graph records one GPU's steps, which {reason} does not allow")


def last_gradient(model: nn.Module) -> Tensor:
    """Zero, or NaN where the last layer's gradient is not finite (on any process, after DDP)."""
    gradient = [p.grad for p in model.parameters() if p.grad is not None][-1]
    return gradient.sum(dtype=torch.float32) * 0.0
