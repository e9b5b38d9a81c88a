"""A config with all that follows from it: what `lsmha train --dry-run` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..data import cifar100_names, glyphs
from ..models import CCT
from .config import TrainConfig
from .optim import make_optimizer
from .run import build_model
from .schedule import config_lr

LABELS = {"digits": 10, "glyphs100": 100, "cifar100": 100}


def resolve(config: TrainConfig) -> dict[str, Any]:
    """All fields of a config, and what the model, optimiser and schedule make of them.

    No data is read; `mean` and `std` are None where they are measured on the data.
    """
    model = build_model(config, LABELS[config.data])
    optimizer = make_optimizer(model, config)
    decayed, exempt = optimizer.param_groups
    mean, std = _statistics(config)
    lrs = [config_lr(config, epoch) for epoch in range(config.total_epochs)]
    return asdict(config) | {
        "dim": model.fc.in_features,
        "depth": len(model.blocks),
        "num_heads": tuple(b.self_attn.num_heads for b in transformer_blocks(model)),
        "head_dim": tuple(b.self_attn.head_dim for b in transformer_blocks(model)),
        "positional_embedding": _embedding(model),
        "optimizer": type(optimizer).__name__,
        "total_epochs": config.total_epochs,
        "lr_by_epoch": lrs,
        "drop_path_by_block": _drop_paths(model),
        "decayed": _names(model, decayed["params"]),
        "not_decayed": _names(model, exempt["params"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "mean": mean,
        "std": std,
    }


def recipe_lines(config: TrainConfig) -> list[str]:
    """The resolved recipe for people, a setting a line; long lists in short."""
    recipe = resolve(config)
    lrs = recipe.pop("lr_by_epoch")
    decayed, exempt = recipe.pop("decayed"), recipe.pop("not_decayed")
    marks = sorted({0, 1, int(config.warmup_epochs), config.epochs // 2, config.total_epochs - 1})
    recipe["lr at epoch"] = ", ".join(f"{e}: {lrs[e]:.4g}" for e in marks if e < len(lrs))
    recipe["weight decay"] = (
        f"{config.weight_decay} on {len(decayed)} tensors"
        f"{', among them positional_emb' if 'positional_emb' in decayed else ''}; "
        f"none on {len(exempt)} (1-D tensors and biases)"
    )
    recipe["evaluation"] = "whole images, no resizing (crop fraction 1.0)"
    return [f"{key.replace('_', ' '):22} {_text(value)}" for key, value in recipe.items()]


def transformer_blocks(model: CCT) -> list:
    """The blocks with heads."""
    return [block for block in model.blocks if hasattr(block, "self_attn")]


def _drop_paths(model: CCT) -> tuple[float, ...]:
    rates: list[Any] = [block.drop_path.p for block in model.blocks]  # type: ignore[union-attr]
    return tuple(round(rate, 6) for rate in rates)


def _embedding(model: CCT) -> str:
    if model.positional_emb is None:
        return "none"
    return "learnable" if model.positional_emb.requires_grad else "sine"


def _names(model: CCT, parameters: list) -> tuple[str, ...]:
    wanted = {id(p) for p in parameters}
    return tuple(name for name, p in model.named_parameters() if id(p) in wanted)


def _statistics(config: TrainConfig) -> tuple[Any, Any]:
    if config.data == "cifar100":
        return cifar100_names.MEAN, cifar100_names.STD
    if config.data == "glyphs100":
        return glyphs.TIERS[config.tier].mean, glyphs.TIERS[config.tier].std
    return None, None


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return "-" if value is None else str(value)
