"""The one description of a training run: a frozen dataclass whose fields are the flags."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

AMP = ("auto", "off", "bf16", "fp16")
DATA = ("digits", "glyphs100", "cifar100")
TIERS = ("easy", "medium", "hard")


def _flag(default: Any, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help, **extra})


def parse_per_block(text: str) -> int | tuple[int, ...]:
    """ "16" -> 16, "16,32" -> (16, 32)."""
    numbers = tuple(int(part) for part in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Times are in epochs, learning rates are those of AdamW."""

    data: str = _flag("digits", "data set", choices=DATA)
    data_root: str | None = _flag(None, "folder of the data set, for cifar100")
    allow_unverified: bool = _flag(False, "accept cifar100 files with unknown hashes")
    tier: str = _flag("easy", "difficulty of glyphs100", choices=TIERS)
    model: str = _flag("cct_2_3x2_32", "model name, for example cct_7_3x1_32")
    num_heads: int | tuple[int, ...] | None = _flag(
        None, "heads, one number or one per transformer block: 16 or 16,32", parse=parse_per_block
    )
    head_dim: int | tuple[int, ...] | None = _flag(
        None,
        "channels of a head, one number or one per transformer block; "
        "the width over the heads by default",
        parse=parse_per_block,
    )
    mlp_hidden: int | tuple[int, ...] | None = _flag(
        None,
        "hidden channels of the MLP, one number or one per transformer block; "
        "by default what the model's name says",
        parse=parse_per_block,
    )
    conv_blocks: int = _flag(0, "how many of the first blocks are convolutions")
    conv_residual: bool = _flag(False, "residual connection around those convolutions")
    pre_norm: bool = _flag(False, "standard pre-norm blocks instead of the published form")
    attn_drop: float = _flag(0.1, "dropout of the attention weights")
    drop_path: float = _flag(0.1, "stochastic depth of the last block")
    epochs: int = _flag(30, "epochs")
    batch_size: int = _flag(128, "images of a step")
    lr: float = _flag(6e-4, "highest learning rate")
    min_lr: float = _flag(1e-5, "last learning rate of the cosine")
    warmup_lr: float = _flag(1e-6, "first learning rate of the warm-up")
    warmup_epochs: float = _flag(3.0, "epochs of linear warm-up")
    weight_decay: float = _flag(0.06, "of matrices; biases and norms are exempt")
    label_smoothing: float = _flag(0.1, "label smoothing")
    mixup: float = _flag(0.0, "mixup alpha, 0 is off (published: 0.8)")
    cutmix: float = _flag(0.0, "cutmix alpha, 0 is off (published: 1.0)")
    erase: float = _flag(0.0, "probability of random erasing (published: 0.25)")
    augment: bool = _flag(True, "random crop, and flip where the labels allow it")
    amp: str = _flag("auto", "mixed precision; auto is bf16 on CUDA, off on a CPU", choices=AMP)
    backend: str | None = _flag(None, "backend of every op; the fastest by default")
    seed: int = _flag(0, "seed of weights, order, augmentation and dropout")
    device: str = _flag("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        """Refuse values that no run could use.

        Raises:
            ValueError: with the flag, the value and what is allowed.
        """
        for f in fields(self):
            choices = f.metadata.get("choices")
            if choices and getattr(self, f.name) not in choices:
                _refuse(f.name, getattr(self, f.name), f"one of {', '.join(choices)}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                _refuse(name, getattr(self, name), "at least 1")
        for name in ("attn_drop", "drop_path", "label_smoothing", "erase"):
            if not 0.0 <= getattr(self, name) < 1.0:
                _refuse(name, getattr(self, name), "at least 0 and below 1")
        rates = ("lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "mixup", "cutmix")
        for name in rates:
            if not 0.0 <= getattr(self, name) < float("inf"):
                _refuse(name, getattr(self, name), "at least 0 and finite")
        if self.conv_blocks < 0:
            _refuse("conv_blocks", self.conv_blocks, "at least 0")

    def to_json(self) -> str:
        """One JSON object, a field a line."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> TrainConfig:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the file is not such an object.
        """
        try:
            values = json.loads(path.read_text())
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**values)
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the config of a run: {error}") from error


def _refuse(name: str, value: object, allowed: str) -> None:
    raise ValueError(f"--{name.replace('_', '-')} must be {allowed}, got {value}")
