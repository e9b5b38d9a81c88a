"""The flags of `lsmha prune`: a frozen dataclass whose fields they are; imports no torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any


def _flag(default: Any, parse: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "parse": parse, "choices": choices})


SPLITS = ("train", "test")


@dataclass(frozen=True)
class PruneOptions:
    """Choices of `lsmha prune`; those of the method are explained in docs/pruning.md."""

    criterion: str = _flag(
        "shp",
        str,
        "shp removes heads, andc nodes and connections to labels, afcc connections between nodes",
        ("shp", "andc", "afcc"),
    )
    fraction: float | None = _flag(None, float, "share of all heads to remove")
    number: int | None = _flag(None, int, "heads to remove")
    max_drop: float | None = _flag(
        None, float, "remove heads while the accuracy on the choice split drops by at most this"
    )
    keep_per_label: int = _flag(
        1, int, "without the three above: remove what leaves every label so many heads per block"
    )
    threshold: float = _flag(0.5, float, "of the clusters")
    normalize: str = _flag("matrix", str, "of the fields", ("matrix", "row"))
    choice_split: str = _flag(
        "train", str, "split to choose on; of train, every fifth image, the probes see the others",
        SPLITS,
    )  # fmt: skip
    split: str = _flag("test", str, "split to measure accuracies on", SPLITS)
    steps: int = _flag(8, int, "evenly spaced numbers of removed heads to measure as well")
    random_seeds: int = _flag(3, int, "random controls of every size")
    probe_epochs: int = _flag(40, int, "epochs of the probes")
    probe_lr: float = _flag(1e-2, float, "learning rate of the probes")
    finetune_epochs: int = _flag(0, int, "epochs of training after pruning, for heads")
    finetune_lr: float | None = _flag(None, float, "its learning rate; a tenth of the run's")
    timing_rounds: int = _flag(15, int, "timed batches of every model, 0 times nothing")
    timing_batch: int = _flag(32, int, "images of a timed batch")
    weights: str = _flag("best", str, "weights of the run", ("best", "last"))
    batch_size: int = _flag(256, int, "images of a batch")
    data_root: str | None = _flag(None, str, "folder of the data set, if it moved since training")
    device: str = _flag("auto", str, "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        """Refuse values that no pruning could use.

        Raises:
            ValueError: with the flag, the value and what is allowed.
        """
        given = [n for n in ("fraction", "number", "max_drop") if getattr(self, n) is not None]
        if len(given) > 1:
            flags = ", ".join(map(_name, given))
            raise ValueError(f"{flags}: give one of them")
        if self.criterion != "shp":
            heads_only = [*given, *(["finetune_epochs"] if self.finetune_epochs else [])]
            if heads_only:
                flags = ", ".join(map(_name, heads_only))
                raise ValueError(
                    f"{flags}: only for heads (--criterion shp); {self.criterion} removes what "
                    "--threshold leaves without a label, and training would bring it back"
                )
        for name in ("keep_per_label", "steps", "probe_epochs", "timing_batch", "batch_size"):
            self._need(name, getattr(self, name) >= 1, "at least 1")
        for name in ("number", "random_seeds", "finetune_epochs", "timing_rounds"):
            self._need(name, (getattr(self, name) or 0) >= 0, "at least 0")
        for name in ("fraction", "max_drop"):
            self._need(name, 0 <= (getattr(self, name) or 0) <= 1, "in 0..1")
        self._need("threshold", 0 < self.threshold <= 1, "above 0, at most 1")
        for name in ("probe_lr", "finetune_lr"):
            value = 1.0 if getattr(self, name) is None else getattr(self, name)
            self._need(name, 0 < value < float("inf"), "above 0 and finite")

    def _need(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{_name(name)} must be {allowed}, got {getattr(self, name)}")

    def choices(self) -> dict[str, object]:
        """The options behind the numbers, all but where things lie."""
        places = ("data_root", "device", "criterion", "split", "choice_split")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in places}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of `PruneOptions`."""
    for f in fields(PruneOptions):
        text = f.metadata["help"]
        if f.default is not None:
            text += f" (default: {f.default})"
        parser.add_argument(
            _name(f.name),
            type=f.metadata["parse"],
            choices=f.metadata["choices"],
            default=f.default,
            help=text,
        )


def from_flags(args: argparse.Namespace) -> PruneOptions:
    """What the parser of `add_flags` gave.

    Raises:
        ValueError: values that no pruning could use.
    """
    return PruneOptions(**{f.name: getattr(args, f.name) for f in fields(PruneOptions)})


def _name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")
