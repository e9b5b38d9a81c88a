"""A run folder: config.json, metrics.jsonl, last and best weights, and the state to go on from."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .._files import atomic_file
from ..data import ImageDataset, load_dataset
from ..models import CCT, create_model, parse_name
from .checkpoint import load_weights
from .config import TrainConfig
from .lock import LOCK

CONFIG, METRICS = "config.json", "metrics.jsonl"
WEIGHTS = {"best": "best.safetensors", "last": "last.safetensors"}


@dataclass(frozen=True)
class Run:
    """A finished or interrupted run: its folder, its config and the trained model."""

    folder: Path
    config: TrainConfig
    model: CCT


def build_model(config: TrainConfig, num_classes: int) -> CCT:
    """The model of a run, freshly initialised from the run's seed."""
    torch.manual_seed(config.seed)
    named = {key: getattr(config, key) for key in ("dim", "depth", "positional_embedding")}
    return create_model(
        config.model,
        num_classes,
        config.num_heads,
        config.head_dim,
        config.conv_blocks,
        conv_form=config.conv_form,
        conv_hidden=config.conv_hidden,
        conv_residual=config.conv_residual,
        mlp_hidden=config.mlp_hidden,
        pre_norm=config.pre_norm,
        attn_drop=config.attn_drop,
        drop_path=config.drop_path,
        backend=config.backend,
        **{key: value for key, value in named.items() if value is not None},
    )


def load_split(config: TrainConfig, split: str) -> ImageDataset:
    """The training or test images of a run, of the size its model takes."""
    size = parse_name(config.model)["img_size"]
    options: dict[str, dict[str, Any]] = {
        "digits": {},
        "glyphs100": {"tier": config.tier},
        "cifar100": {"allow_unverified": config.allow_unverified},
    }
    dataset = load_dataset(config.data, split, config.data_root, **options[config.data])
    if dataset.images.shape[-1] != size:
        raise ValueError(
            f"--model {config.model} takes {size}x{size} images, "
            f"{dataset.name} has {dataset.images.shape[-1]}x{dataset.images.shape[-2]}"
        )
    if split == "train" and config.train_images is not None:
        return _first(dataset, config.train_images)
    return dataset


def data_name(config: TrainConfig) -> str:
    """How pictures call the data of a run; as `ImageDataset.name`, without reading it."""
    return f"glyphs100-{config.tier} (generated)" if config.data == "glyphs100" else config.data


def _first(dataset: ImageDataset, count: int) -> ImageDataset:
    """The first `count` images; mean and std stay those of the whole split."""
    if count > len(dataset):
        raise ValueError(f"--train-images {count}: {dataset.name} has {len(dataset)}")
    return dataset.part(slice(count))


def pick_device(name: str) -> torch.device:
    """ "auto" is the first GPU, else the CPU.

    Raises:
        ValueError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def check_new(folder: Path) -> None:
    """Refuse a run folder that holds something.

    Raises:
        ValueError: it does.
    """
    if folder.exists() and (not folder.is_dir() or _contents(folder)):
        raise ValueError(f"--out {folder} exists already; give another, or --resume {folder}")


def _contents(folder: Path) -> list[str]:
    """Names in a folder that are not left-overs of a process that was killed as it started."""
    return [p.name for p in folder.iterdir() if p.name != LOCK and p.suffix != ".part"]


def write_config(folder: Path, config: TrainConfig) -> None:
    """Make `folder` a run folder."""
    with atomic_file(folder / CONFIG) as part:
        part.write_text(config.to_json())


def holds_run(folder: Path, config: TrainConfig) -> bool:
    """Whether `folder` is a run of this very config (on any device); False where there is none.

    Raises:
        ValueError: it holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not _contents(folder)):
        return False
    if not (folder / CONFIG).is_file():
        raise ValueError(f"--out {folder} exists already and is not a run folder")
    found = read_config(folder)
    if replace(found, device=config.device, data_root=config.data_root) != config:
        names = [n for n, value in vars(config).items() if getattr(found, n) != value]
        raise ValueError(f"--out {folder} is a run of another config: {', '.join(sorted(names))}")
    return True


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Add one line to metrics.jsonl."""
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, one per epoch."""
    path = folder / METRICS
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    # the last line may be torn by a full disk or a kill
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def keep_metrics(folder: Path, epochs: int) -> None:
    """Forget rows after the first `epochs`, which a resumed run will write again."""
    if not (folder / METRICS).exists():
        return
    rows = [row for row in read_metrics(folder) if row["epoch"] <= epochs]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with atomic_file(folder / METRICS) as part:
        part.write_text(text)


def read_config(folder: Path) -> TrainConfig:
    """The config of a run.

    Raises:
        FileNotFoundError: `folder` is not a run.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no {CONFIG}")
    return TrainConfig.from_json(folder / CONFIG)


def load_run(folder: Path, which: str = "best") -> Run:
    """Read a run and its weights.

    Args:
        folder: what `train` wrote.
        which: "best" (highest test accuracy) or "last".

    Returns:
        The run with its model, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: not a run, or not trained yet.
        ValueError: damaged files, or weights of another model.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / WEIGHTS[which]
    weights = load_weights(path)
    if "fc.weight" not in weights:
        raise ValueError(f"{path} holds no classifier (fc.weight)")
    model = build_model(config, num_classes=len(weights["fc.weight"]))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model of {folder / CONFIG}") from error
    return Run(folder, config, model.eval())
