"""What a run says: lines for people, JSONL always, TensorBoard and trackers on request."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from .._files import atomic_file
from .config import TrainConfig
from .run import append_metrics, read_metrics

TRACKERS = ("wandb", "trackio")


class Sink(Protocol):
    """Somewhere that takes the numbers of an epoch."""

    def log(self, row: dict[str, Any]) -> None:
        """Take one row of metrics.jsonl."""

    def close(self) -> None:
        """Write what is not written yet."""


class JsonLines:
    """metrics.jsonl in the run folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def log(self, row: dict[str, Any]) -> None:
        """Append the row."""
        append_metrics(self.folder, row)

    def close(self) -> None:
        """Nothing is held back."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard")

    def log(self, row: dict[str, Any]) -> None:
        """One point per number, at the row's epoch."""
        for key, value in row.items():
            if key != "epoch":
                self.writer.add_scalar(key, value, row["epoch"])

    def close(self) -> None:
        """Flush the events."""
        self.writer.close()


class Tracker:
    """wandb or trackio: both have init, log and finish of the same form."""

    def __init__(self, name: str, folder: Path, config: TrainConfig):
        self.module = importlib.import_module(name)
        self.module.init(project="lsmha_fast", name=folder.name, config=vars(config))

    def log(self, row: dict[str, Any]) -> None:
        """Send the row."""
        self.module.log(row)

    def close(self) -> None:
        """Finish the tracked run."""
        self.module.finish()


def check_sinks(tensorboard: bool, tracker: str | None) -> None:
    """Refuse what `make_sinks` would, before anything is written.

    Raises:
        ModuleNotFoundError: a package that was asked for is not installed.
        ValueError: an unknown tracker.
    """
    if tracker is not None and tracker not in TRACKERS:
        raise ValueError(f"--tracker must be one of {', '.join(TRACKERS)}, got {tracker}")
    for name in (*(["tensorboard"] if tensorboard else []), *([tracker] if tracker else [])):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is not installed: pip install {name}")


def make_sinks(folder: Path, config: TrainConfig, tensorboard: bool, tracker: str | None) -> list:
    """All sinks of a run, JSON lines first."""
    sinks: list[Sink] = [JsonLines(folder)]
    if tensorboard:
        sinks.append(TensorBoard(folder))
    if tracker is not None:
        sinks.append(Tracker(tracker, folder, config))
    return sinks


class Console:
    """A bar on a terminal, and one line per epoch: epoch, loss, accuracy, best, images/s, ETA.

    Args:
        config: of the run.
        say: takes a line.
        silent: neither bar nor lines.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None], silent: bool = False):
        self.total, self.say, self.silent = config.total_epochs, say, silent
        self.started, self.epochs_before = time.perf_counter(), -1

    def bar(self, epoch: int, step: int, steps: int, best: float):
        """A tqdm bar of one epoch; `update(1)` after every step."""
        from tqdm import tqdm

        if self.epochs_before < 0:
            self.epochs_before = epoch
        done = f"best {100 * best:.2f} %" if epoch else "starting"
        return tqdm(
            total=steps,
            initial=step,
            desc=f"epoch {epoch + 1}/{self.total} ({done})",
            disable=True if self.silent else None,
            leave=False,
        )

    def epoch(self, row: dict[str, Any], best: float, best_epoch: int) -> None:
        """The line of a finished epoch."""
        if self.silent:
            return
        done = row["epoch"] - self.epochs_before
        left = (time.perf_counter() - self.started) / done * (self.total - row["epoch"])
        self.say(
            f"epoch {row['epoch']}/{self.total}  loss {row['train_loss']:.3f}  "
            f"test {100 * row['test_accuracy']:.2f} %  best {100 * best:.2f} % ({best_epoch})  "
            f"{row['train_images_per_s']:,.0f} images/s  ETA {duration(left)}"
        )


def duration(seconds: float) -> str:
    """ "1 h 02 min", "3 min 05 s" or "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def write_curves(folder: Path) -> Path | None:
    """Loss and accuracy over the epochs as RUN/curves.png; None without matplotlib or rows."""
    rows = read_metrics(folder)
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    if not rows:
        return None
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for key in ("train_loss", "test_loss"):
        left.plot(epochs, [row[key] for row in rows], label=key.replace("_", " "))
    right.plot(epochs, [100 * row["test_accuracy"] for row in rows])
    left.set(xlabel="epoch", ylabel="cross entropy")
    left.legend()
    right.set(xlabel="epoch", ylabel="test accuracy, %")
    path = folder / "curves.png"
    with atomic_file(path) as part:
        figure.savefig(part, dpi=120, format="png")
    return path
