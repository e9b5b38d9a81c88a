"""`lsmha committee`: several runs of one data set as one soft committee."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from . import analysis
from ._shp_command import NormalizedBatches
from .info import versions
from .train.config import TrainConfig
from .train.run import load_run, load_split, pick_device, read_config


@dataclass(frozen=True)
class CommitteeOptions:
    """Choices of `lsmha committee`."""

    weights: str = "best"
    samples: int = 2000
    max_subsets: int = 200
    batch_size: int = 256
    seed: int = 0
    data_root: str | None = None
    device: str = "auto"


def committee_of_runs(
    folders: Sequence[Path],
    out: Path,
    options: CommitteeOptions,
    *,
    command: str | None = None,
) -> Iterator[str]:
    """Measure every committee of the runs on their test split; yields lines and writes `out`.

    `command`, the command line that asked for it, is kept in the record.

    Raises:
        ValueError, OSError: fewer than two runs, one run twice, runs of different data, damaged
            files, or a folder that holds other things.
    """
    if len(folders) < 2:
        raise ValueError(f"a committee needs at least two runs, got {len(folders)}")
    places = [folder.resolve() for folder in folders]
    twice = [str(f) for f, place in zip(folders, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ValueError(f"every run may be given once; {twice[0]} is given again")
    configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if _data(config) != _data(configs[0]):
            raise ValueError(
                f"{folder} was trained on {_data(config)}, {folders[0]} on {_data(configs[0])}; "
                "a committee needs one data set"
            )
    analysis.check_folder(out)
    config = configs[0]
    if options.data_root is not None:
        config = replace(config, data_root=options.data_root)
    device = pick_device(options.device)
    test_set = load_split(config, "test")
    batches = NormalizedBatches(test_set, options.batch_size, device, shuffle=False)
    yield f"{len(folders)} members, one after the other, on {test_set.name}"
    committee = analysis.soft_committee(
        _members(folders, options.weights, test_set.num_classes),
        batches,
        names=_names(folders),
        groups=[architecture(c) for c in configs],
        max_subsets=options.max_subsets,
        samples=options.samples,
        seed=options.seed,
        device=device,
    )
    origin = {"command": command, "weights": options.weights, "versions": versions()}
    files = analysis.write_committee(out, committee, title=test_set.name, origin=origin)
    yield from analysis.committee_lines(committee)
    yield "written:"
    yield from (f"  {path}" for path in files)


def architecture(config: TrainConfig) -> str:
    """What two seeds of one architecture have in common, in words."""

    def numbers(value) -> str:
        return str(value).strip("()")

    heads = config.num_heads
    words = [config.model, "standard" if heads is None else numbers(heads), "heads"]
    if config.head_dim is not None:
        words.append(f"of {numbers(config.head_dim)}")
    if config.conv_blocks:
        words.append(f"after {config.conv_blocks} {config.conv_form} convolutions")
        if config.conv_hidden is not None:
            words.append(f"through {config.conv_hidden} channels")
        if config.conv_residual:
            words.append("with residuals")
    for name in ("dim", "depth", "mlp_hidden", "positional_embedding"):
        if (value := getattr(config, name)) is not None:
            words.append(f"{name} {numbers(value)}")
    return " ".join([*words, "pre-norm"] if config.pre_norm else words)


def _data(config: TrainConfig) -> str:
    return f"{config.data} ({config.tier})" if config.data == "glyphs100" else config.data


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names where these differ, else their paths."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _members(folders: Sequence[Path], weights: str, num_classes: int) -> Iterator[nn.Module]:
    """The models of the runs; none is held while the next one is made."""
    for folder in folders:
        run = load_run(folder, weights)
        if run.model.fc.out_features != num_classes:
            raise ValueError(
                f"{folder} has {run.model.fc.out_features} classes, the data set has {num_classes}"
            )
        model = run.model
        del run
        yield model
        del model
