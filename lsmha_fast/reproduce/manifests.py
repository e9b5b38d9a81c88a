"""Which runs make up a result: named lists of presets and seeds, and how they are shortened."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..train.config import CONV_FORMS, TrainConfig
from ..train.presets import HEADS, MAX_CONV_BLOCKS, preset

# top-1 on CIFAR-100 in percent, best epoch: README of SHI-Labs/Compact-Transformers
PUBLISHED = {"compact-300": 80.92, "compact-1500": 82.72, "compact-5000": 82.87}


@dataclass(frozen=True)
class PlannedRun:
    """One run: its folder's name, the recipe it comes from, and its config."""

    name: str
    preset: str
    config: TrainConfig


@dataclass(frozen=True)
class Manifest:
    """A list of runs and what is measured on them.

    Attributes:
        name: as given on the command line.
        title: what the runs are to show.
        runs: in the order of execution.
        shp: presets whose first seed gets probes and the SHP of all heads.
        scale: share of the epochs that are run.
        changes: fields that every run has differently from its preset.
    """

    name: str
    title: str
    runs: tuple[PlannedRun, ...]
    shp: tuple[str, ...]
    scale: float
    changes: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Presets of a manifest, before seeds, scale and changes."""

    title: str
    presets: tuple[str, ...]
    shp: tuple[str, ...] = ()
    seeds: int = 1


_HYBRIDS = tuple(f"hybrid-{k}-{f}" for f in CONV_FORMS for k in range(1, MAX_CONV_BLOCKS + 1))
_HEADS = (*(f"heads-{h}" for h in HEADS), "heads-100x4")
PLANS = {
    "baselines": Plan("The published CCT baselines", tuple(PUBLISHED), ("compact-300",)),
    "heads": Plan("Accuracy against the number of heads", _HEADS, _HEADS),
    "hybrids": Plan(
        "The first k of 7 blocks as convolutions, in three forms", ("heads-64", *_HYBRIDS)
    ),
    "early": Plan(
        "Do convolutions in place of the first blocks speed up early learning?",
        ("heads-64", "hybrid-2-full", "hybrid-4-full"),
        ("heads-64", "hybrid-4-full"),
    ),
    "committee": Plan(
        "Soft committees: different head counts against seeds of one",
        ("heads-16", "heads-32", "heads-64", "heads-128"),
        seeds=3,
    ),
    "paper": Plan(
        "Baseline, many heads, hybrids and committees of arXiv 2506.23832",
        ("compact-300", *_HEADS, *_HYBRIDS),
        ("compact-300", "heads-64", "heads-128", "heads-100x4", "hybrid-3-full"),
    ),
}


def make_manifest(
    name: str,
    *,
    seeds: int | None = None,
    scale: float = 1.0,
    changes: dict[str, Any] | None = None,
) -> Manifest:
    """The runs of a plan.

    Args:
        name: a key of `PLANS`.
        seeds: runs of every preset, seeds 42, 43, ...; the plan's own number by default.
        scale: share of the epochs (of cosine, warm-up and cool-down alike), in (0, 1]. A
            shortened run changes its learning rate every step, since its warm-up may be shorter
            than an epoch.
        changes: fields of TrainConfig that differ in every run. Letters and digits are never
            mirrored, whatever the preset says.

    Raises:
        ValueError: an unknown name, or a value that no run could use.
    """
    if name not in PLANS:
        raise ValueError(f"the manifest must be one of {', '.join(PLANS)}, got {name}")
    if not 0.0 < scale <= 1.0:
        raise ValueError(f"--scale must be above 0 and at most 1, got {scale:g}")
    plan, changes = PLANS[name], dict(changes or {})
    if changes.get("data", "cifar100") != "cifar100":
        changes.setdefault("flip", 0.0)
    first = changes.pop("seed", 42)
    runs = []
    for seed in range(first, first + (seeds or plan.seeds)):  # the first seed of all comes first
        for preset_name in plan.presets:
            config = shorten(preset(preset_name, **changes, seed=seed), scale)
            runs.append(PlannedRun(f"{preset_name}-s{seed}", preset_name, config))
    return Manifest(name, plan.title, tuple(runs), plan.shp, scale, changes)


def shorten(config: TrainConfig, scale: float) -> TrainConfig:
    """The same recipe in `scale` of its epochs, at least one."""
    if scale == 1.0:
        return config
    epochs = max(1, round(config.epochs * scale))
    return replace(
        config,
        epochs=epochs,
        cooldown_epochs=round(config.cooldown_epochs * scale),
        warmup_epochs=config.warmup_epochs * epochs / config.epochs,
        lr_per_epoch=False,
    )
