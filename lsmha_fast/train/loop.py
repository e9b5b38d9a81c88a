"""Train a model and leave a run folder that says all about it and can always go on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from .._files import atomic_file
from .bad_step import Diverged
from .checkpoint import load_checkpoint, save_checkpoint, save_state, save_weights
from .config import TrainConfig
from .distributed import joined
from .evaluation import Stopped
from .lock import locked
from .logs import Console, check_sinks, make_sinks, write_curves
from .run import (
    WEIGHTS,
    build_model,
    check_new,
    holds_run,
    keep_metrics,
    load_split,
    pick_device,
    read_config,
    write_config,
)
from .signals import StopFlag, stop_flag
from .trainer import Trainer

GPU_ASK = 8  # steps between two exchanges of flags where several GPUs train


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out, not what it computes; free to change when it goes on.

    Args:
        save_seconds: between two checkpoints.
        tensorboard: write its logs into the run folder.
        tracker: "wandb" or "trackio", or None.
        compile: a mode of torch.compile, or None.
        cuda_graph: record the step and the evaluation once as CUDA graphs, then replay them.
        silent: neither progress bar nor lines.
    """

    save_seconds: float = 60.0  # between two checkpoints; the end of the run is always saved
    tensorboard: bool = False
    tracker: str | None = None
    compile: str | None = None
    cuda_graph: bool = False
    silent: bool = True


class RunResult(NamedTuple):
    """Where the run is, and its test accuracies in 0..1."""

    folder: Path
    best_accuracy: float
    best_epoch: int
    last_accuracy: float
    seconds: float
    stopped_by: int | None = None  # the signal that ended it early


def train(
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool | str = False,
    options: RunOptions | None = None,
    say: Callable[[str], None] = print,
) -> RunResult:
    """Train, evaluate after every epoch, and keep the run resumable at every moment.

    Every step's order, augmentation and dropout follow from (seed, epoch, step, rank), so an
    interrupted and resumed run gives the bits of an uninterrupted one on the same device. SIGTERM
    and SIGINT save and return after the current step. Under torchrun all its processes share the
    run: each takes its part of every batch, rank 0 writes.

    Args:
        config: what to train; when resuming, the run's own config is read and only the device of
            this one counts.
        folder: the run folder.
        resume: False: the folder must be new. True: go on from the last checkpoint. "auto": go on
            if the folder is a run of this config, else start.
        options: see `RunOptions`.
        say: takes the lines for people.

    Returns:
        Where the run is, and its best and last accuracy.

    Raises:
        ValueError: bad data, model or folder, a folder in use, or a loss that is not finite.
        OSError: a full disk or a folder that cannot be written; the last checkpoint is intact.
    """
    options = options or RunOptions()
    check_sinks(options.tensorboard, options.tracker)
    with joined(config) as peers, stop_flag() as stop:
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
            resume = resume or "auto"
        if resume == "auto":
            resume = peers.share(holds_run(folder, config) if peers.is_main else None)
        if resume:
            config = replace(read_config(folder), device=config.device)
        elif peers.is_main:
            check_new(folder)
        device = peers.device(pick_device(config.device))
        train_set, test_set = load_split(config, "train"), load_split(config, "test")
        model = build_model(config, len(train_set.class_names)).to(device)
        trainer = Trainer(
            config,
            model,
            train_set,
            test_set,
            device,
            peers=peers,
            compiled=options.compile,
            graphed=options.cuda_graph,
        )
        trainer.try_one_image()  # what cannot run shall fail before anything is written
        session = Session(config, folder, trainer, options, stop, say)
        with session.opened(bool(resume)):
            finished = session.run()
        return session.result(None if finished else stop.signal or signal.SIGTERM)


def write_run(config: TrainConfig, folder: Path, model: nn.Module, *, epoch: int) -> RunResult:
    """Make a run of weights that were not trained in it, which `train` with `resume` goes on with.

    Args:
        config: of the run; its sizes are those of `model`.
        folder: new or empty.
        model: on any device; moved to the config's.
        epoch: whole epochs that count as done; 0 for a run that is still to be trained.

    Returns:
        Where the run is, and what is known of its accuracy.

    Raises:
        ValueError: bad data or folder.
    """
    check_new(folder)
    device = pick_device(config.device)
    train_set, test_set = load_split(config, "train"), load_split(config, "test")
    trainer = Trainer(config, model.to(device), train_set, test_set, device)
    trainer.adopt(epoch)
    with stop_flag() as stop:
        session = Session(config, folder, trainer, RunOptions(), stop, print)
        with session.opened(resume=False):
            session.save(whole_epoch=True)
    return session.result(None)


class Session:
    """One process's part of a run, from its last checkpoint to the end or a stop."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        trainer: Trainer,
        options: RunOptions,
        stop: StopFlag,
        say: Callable[[str], None],
    ):
        self.config, self.folder, self.trainer, self.options = config, folder, trainer, options
        self.stop, self.peers = stop, trainer.peers
        self.console = Console(config, say, options.silent or not self.peers.is_main)
        self.sinks: list = []
        self.saved_at = self.clock = time.perf_counter()

    @contextlib.contextmanager
    def opened(self, resume: bool):
        """The folder locked, the trainer at the last checkpoint, the logs open."""
        with contextlib.ExitStack() as stack:
            if self.peers.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder))
                if not resume:
                    check_new(self.folder)  # another process may have been faster
                    write_config(self.folder, self.config)
            self.peers.share(None)  # nobody reads before the folder is there
            if resume and (state := load_checkpoint(self.folder)) is not None:
                self.trainer.load(state)
            if self.peers.is_main:
                keep_metrics(self.folder, self.trainer.epoch)
                self.export(whole_epoch=self.trainer.epoch > 0 and self.trainer.step == 0)
                o = self.options
                self.sinks = make_sinks(self.folder, self.config, o.tensorboard, o.tracker)
            try:
                yield
            finally:
                for sink in self.sinks:
                    sink.close()

    def run(self) -> bool:
        """Epochs until the end, a stop (then False), or a loss that is not finite."""
        if self.trainer.epoch == self.trainer.step == 0:
            self.save()
        try:
            while self.trainer.epoch < self.config.total_epochs and self.run_epoch():
                pass
        except Diverged as error:
            self.save_diverged(error)
        finished = self.trainer.epoch == self.config.total_epochs
        if self.peers.is_main and finished:
            write_curves(self.folder)
        return finished

    def run_epoch(self) -> bool:
        """One epoch, or what is left of it; False after a stop."""
        trainer, first = self.trainer, self.trainer.step
        start = time.perf_counter()
        steps = len(trainer.batches)
        with self.console.bar(trainer.epoch, first, steps, trainer.best) as bar:
            for step in trainer.steps():
                bar.update(1)
                if step < steps and self.pause(step):
                    return False
        trainer.bad.check_now()  # which also waits for the device
        images = trainer.batches.num_images - first * self.config.batch_size
        speed = images / (time.perf_counter() - start)
        try:
            row = trainer.finish_epoch(lambda: self.peers.any(self.stop.raised())[0])
        except Stopped:
            self.save()
            return False
        row |= {"train_images_per_s": speed, "seconds": time.perf_counter() - start}
        self.console.epoch(row, trainer.best, trainer.best_epoch)
        for sink in self.sinks:
            sink.log(row)
        # the first epoch's weights at once, so that there is something to look at
        now = trainer.epoch in (1, self.config.total_epochs)
        stop, due = self.peers.any(self.stop.raised(), self.due())
        if now or stop or due:
            self.save(whole_epoch=True)
        return not stop

    def pause(self, step: int) -> bool:
        """Save if it is time to; True if the run must stop here."""
        if self.peers.world_size > 1 and self.trainer.device.type == "cuda":
            if step % GPU_ASK:
                return False
            self.trainer.bad.check_now()  # all processes see it at the same step
        stop, due = self.peers.any(self.stop.raised(), self.due())
        if stop or due:
            self.save()
        return stop

    def due(self) -> bool:
        """Whether the last checkpoint is old."""
        return time.perf_counter() - self.saved_at >= self.options.save_seconds

    def save(self, whole_epoch: bool = False) -> None:
        """Checkpoint, and the weights of the best and, after a whole epoch, the last."""
        self.trainer.bad.check_now()
        if not self.trainer.weights_are_finite():
            raise Diverged(self.trainer.step)
        now = time.perf_counter()
        self.trainer.seconds += now - self.clock
        self.clock = now
        state = self.trainer.state()
        if self.peers.is_main:
            save_checkpoint(self.folder, state)
            self.export(whole_epoch)
        self.saved_at = time.perf_counter()

    def export(self, whole_epoch: bool = False) -> None:
        """Write what analysis reads; the checkpoint before it holds the same weights."""
        if self.trainer.best_weights:
            save_weights(self.folder / WEIGHTS["best"], self.trainer.best_weights)
        if whole_epoch:
            save_weights(self.folder / WEIGHTS["last"], self.trainer.model.state_dict())

    def save_diverged(self, error: Diverged) -> None:
        """Keep the step whose loss is not finite, and say so.

        Raises:
            ValueError: always.
        """
        trainer, step = self.trainer, error.args[0]
        trainer.step = step
        state = trainer.state()
        facts = {"epoch": trainer.epoch, "step": step, "lr": trainer.lr()}
        if self.peers.is_main:
            save_state(self.folder / "diverged.pt", state)
            with atomic_file(self.folder / "diverged.json") as part:
                part.write_text(json.dumps(facts, indent=2) + "\n")
        raise ValueError(
            f"the training loss is not finite in epoch {trainer.epoch + 1}, step {step + 1}; "
            f"the state before that step is in {self.folder}/diverged.pt; "
            f"a lower --lr (now {self.config.lr}) usually helps"
        )

    def result(self, stopped_by: int | None) -> RunResult:
        """What came of it; where another process got the signal, it is taken for SIGTERM."""
        trainer = self.trainer
        return RunResult(
            self.folder,
            trainer.best,
            trainer.best_epoch,
            trainer.last,
            trainer.seconds,
            stopped_by,
        )
