"""The one description of a training run: a frozen dataclass whose fields are the flags."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

AMP = ("auto", "off", "bf16", "fp16")
DATA = ("digits", "glyphs100", "cifar100")
TIERS = ("easy", "medium", "hard")
PIPELINES = ("light", "recipe", "device")
CONV_FORMS = ("full", "separable", "bottleneck")
EMBEDDINGS = ("learnable", "sine", "none")


def _flag(default: Any, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help, **extra})


def parse_per_block(text: str) -> int | tuple[int, ...]:
    """ "16" -> 16, "16,32" -> (16, 32)."""
    numbers = tuple(int(part) for part in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers


def parse_hidden(text: str) -> int | str:
    """ "96" -> 96; "params" and "macs" stay words."""
    return text if text in ("params", "macs") else int(text)


def parse_range(text: str) -> tuple[float, float]:
    """ "0.8,1" -> (0.8, 1.0)."""
    low, high = (float(part) for part in text.split(","))
    return low, high


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Times are in epochs, learning rates are those of AdamW.

    Every field is a flag of `lsmha train`, whose help says what it is.
    """

    data: str = _flag("digits", "data set", choices=DATA)
    data_root: str | None = _flag(None, "folder of the data set, for cifar100")
    allow_unverified: bool = _flag(False, "accept cifar100 files with unknown hashes")
    tier: str = _flag("easy", "difficulty of glyphs100", choices=TIERS)
    train_images: int | None = _flag(None, "train on the first images only; all by default")
    model: str = _flag("cct_2_3x2_32", "model name, for example cct_7_3x1_32")
    dim: int | None = _flag(None, "channels of a token; by the model's name by default")
    depth: int | None = _flag(None, "blocks; by the model's name by default")
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
    conv_form: str = _flag("full", "form of those convolutions", choices=CONV_FORMS)
    conv_hidden: int | str | None = _flag(
        None,
        "channels between them: a number, or params or macs for the replaced block's budget",
        parse=parse_hidden,
    )
    conv_residual: bool = _flag(False, "residual connection around those convolutions")
    pre_norm: bool = _flag(False, "standard pre-norm blocks instead of the published form")
    positional_embedding: str | None = _flag(
        None, "positional embedding; by the model's name by default", choices=EMBEDDINGS
    )
    attn_drop: float = _flag(0.1, "dropout of the attention weights")
    drop_path: float = _flag(0.1, "stochastic depth of the last block")
    epochs: int = _flag(30, "epochs of the cosine")
    cooldown_epochs: int = _flag(0, "epochs at the lowest learning rate, after the others")
    batch_size: int = _flag(128, "images of a step, over all processes")
    drop_last: bool = _flag(False, "leave out the images that do not fill an epoch's last batch")
    lr: float = _flag(6e-4, "highest learning rate")
    min_lr: float = _flag(1e-5, "last learning rate of the cosine")
    warmup_lr: float = _flag(1e-6, "first learning rate of the warm-up")
    warmup_epochs: float = _flag(3.0, "epochs of linear warm-up")
    lr_per_epoch: bool = _flag(False, "change the learning rate once an epoch, not every step")
    weight_decay: float = _flag(0.06, "of matrices; biases and norms are exempt")
    beta1: float = _flag(0.9, "AdamW's decay of the mean gradient")
    beta2: float = _flag(0.999, "AdamW's decay of the mean square")
    eps: float = _flag(1e-8, "AdamW's epsilon")
    label_smoothing: float = _flag(0.1, "label smoothing")
    pipeline: str = _flag(
        "light",
        "input: crop and flip; timm's transforms; the same on the device",
        choices=PIPELINES,
    )
    augment: bool = _flag(True, "random transforms; off leaves the images as they are")
    auto_augment: str = _flag("rand-m9-mstd0.5-inc1", "RandAugment of recipe and device")
    crop_scale: tuple[float, float] = _flag(
        (0.8, 1.0), "area of the random crop of recipe and device", parse=parse_range
    )
    crop_ratio: tuple[float, float] = _flag(
        (3 / 4, 4 / 3), "width over height of that crop", parse=parse_range
    )
    interpolation: str = _flag("random", "of that crop", choices=("random", "bilinear", "bicubic"))
    flip: float | None = _flag(None, "probability of a mirror image; by the data set by default")
    erase: float = _flag(0.0, "probability of random erasing, with noise for every pixel")
    mixup: float = _flag(0.0, "mixup alpha, 0 is off")
    cutmix: float = _flag(0.0, "cutmix alpha, 0 is off")
    mix_prob: float = _flag(1.0, "probability that a batch is mixed")
    mix_switch_prob: float = _flag(0.5, "probability of cutmix where both are on")
    workers: int = _flag(0, "processes that prepare images, for recipe")
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
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if choices and value not in choices and not (value is None and f.default is None):
                _refuse(f.name, value, f"one of {', '.join(choices)}")
        for names, allowed, fits in _LIMITS:
            for name in names:
                value = getattr(self, name)
                if value is not None and not fits(value):
                    _refuse(name, value, allowed)
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high < float("inf"):
                _refuse(name, f"{low},{high}", "two numbers, 0 < LOW <= HIGH")

    @property
    def total_epochs(self) -> int:
        """Epochs that are run: the cool-down comes on top."""
        return self.epochs + self.cooldown_epochs

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
            values: dict[str, Any] = json.loads(path.read_text())
            tuples = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
            return cls(**values | tuples)
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the config of a run: {error}") from error


# names of fields, what is allowed, the check; None is always allowed where it is the default
_LIMITS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (
        ("epochs", "batch_size", "train_images", "dim", "depth"),
        "at least 1",
        lambda value: value >= 1,
    ),
    (("conv_blocks", "cooldown_epochs", "workers"), "at least 0", lambda value: value >= 0),
    (
        ("attn_drop", "drop_path", "label_smoothing", "erase", "beta1", "beta2"),
        "at least 0 and below 1",
        lambda value: 0.0 <= value < 1.0,
    ),
    (("mix_prob", "mix_switch_prob", "flip"), "in 0..1", lambda value: 0.0 <= value <= 1.0),
    (
        (
            *("lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "eps"),
            *("mixup", "cutmix"),
        ),
        "at least 0 and finite",
        lambda value: 0.0 <= value < float("inf"),
    ),
)


def _refuse(name: str, value: object, allowed: str) -> None:
    raise ValueError(f"--{name.replace('_', '-')} must be {allowed}, got {value}")
