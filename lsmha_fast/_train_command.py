"""`lsmha train`: one flag per field of TrainConfig, a preset behind them, a run folder."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from .train.config import TrainConfig
from .train.presets import PRESETS, preset

FLAG_TYPES = {
    "str": str,
    "str | None": str,
    "int": int,
    "int | None": int,
    "float": float,
    "float | None": float,
}


def add_train(commands) -> None:
    """Register the command."""
    train = commands.add_parser("train", help="train a model and write a run folder")
    text = "named recipe; other flags change it (see docs/training.md)"
    train.add_argument("--preset", choices=PRESETS, metavar="NAME", help=text)
    add_config_flags(train)
    where = "run folder (default: runs/DATA-MODEL-hHEADS-sSEED)"
    train.add_argument("--out", type=Path, help=where)
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on with an interrupted run")
    text = "go on if --out is an interrupted run of this config, else start"
    train.add_argument("--auto-resume", action="store_true", help=text)
    text = "print the resolved recipe and stop"
    train.add_argument("--dry-run", action="store_true", help=text)
    text = "seconds between checkpoints (default: 60)"
    train.add_argument("--save-seconds", type=float, default=60.0, help=text)
    train.add_argument("--tensorboard", action="store_true", help="event files in the run folder")
    train.add_argument("--tracker", choices=("wandb", "trackio"), help="log there, too")
    modes = ("default", "reduce-overhead", "max-autotune")
    text = "torch.compile the model; reduce-overhead also records CUDA graphs"
    train.add_argument("--compile", choices=modes, help=text)
    text = "record the whole step, and the evaluation, as CUDA graphs and replay them"
    train.add_argument("--cuda-graph", action="store_true", help=text)
    text = "time STEPS steps, write a trace and a table to --out, and stop"
    train.add_argument("--profile", type=int, metavar="STEPS", help=text)
    train.set_defaults(run=run_train)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field; only what the user gave arrives in the namespace."""
    for f in fields(TrainConfig):
        text = f.metadata["help"]
        if f.default not in (None, MISSING):
            text += f" (default: {f.default})"
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, help=text, default=argparse.SUPPRESS, **_flag_options(f))


def _flag_options(f: Field) -> dict[str, Any]:
    if isinstance(f.default, bool):
        return {"action": argparse.BooleanOptionalAction}
    choices = f.metadata.get("choices")
    return {
        "type": f.metadata.get("parse") or FLAG_TYPES[str(f.type)],
        "choices": choices,
        "metavar": "{" + ",".join(choices) + "}" if choices else f.name.upper(),
    }


def given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of TrainConfig that the user gave a flag for."""
    return {f.name: getattr(args, f.name) for f in fields(TrainConfig) if hasattr(args, f.name)}


def config_flags(config: TrainConfig) -> list[str]:
    """The flags of `lsmha train` that give `config`."""
    flags = []
    for f in fields(TrainConfig):
        value = getattr(config, f.name)
        if value == f.default:
            continue
        flag = f.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{flag}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            flags.append(f"--{flag}={text}")
    return flags


def run_train(args: argparse.Namespace) -> None:
    """Train, and say where the run is."""
    given = given_fields(args)
    if args.resume is not None:
        others = {"out": args.out, "preset": args.preset, "auto-resume": args.auto_resume}
        refused = sorted(set(given) - {"device"}) + [k for k, v in others.items() if v]
        if refused:
            flags = ", ".join("--" + name.replace("_", "-") for name in refused)
            raise ValueError(f"--resume takes the run's own config; leave out {flags}")
    if args.auto_resume and args.out is None:
        raise ValueError("--auto-resume needs --out")
    config = preset(args.preset, **given) if args.preset else TrainConfig(**given)
    if args.dry_run:
        from .train.recipe import recipe_lines

        print("\n".join(recipe_lines(config)))
        return
    if args.profile is not None:
        from .train.profile import profile

        for line in profile(config, args.out or free_folder(config), args.profile):
            print(line)
        return
    train_and_report(args, config)


def train_and_report(args: argparse.Namespace, config: TrainConfig) -> None:
    """Train with lines for people; only rank 0 of several processes prints."""
    from .train.loop import RunOptions, train

    main = os.environ.get("RANK", "0") == "0"
    folder = args.resume or args.out or free_folder(config)
    if "WORLD_SIZE" in os.environ and not (args.resume or args.out):
        raise ValueError("several processes need --out or --resume, so that all mean one folder")

    def say(line: str) -> None:
        if main:
            print(line, flush=True)

    say(f"run folder: {folder}")
    options = RunOptions(
        save_seconds=args.save_seconds,
        tensorboard=args.tensorboard,
        tracker=args.tracker,
        compile=args.compile,
        cuda_graph=args.cuda_graph,
        silent=False,
    )
    resume: bool | str = args.resume is not None or (args.auto_resume and "auto")
    result = train(config, folder, resume=resume, options=options, say=say)
    if result.stopped_by is not None:
        if main:
            word = signal.Signals(result.stopped_by).name
            print(f"saved after {word}; go on with: lsmha train --resume {folder}", file=sys.stderr)
        if result.stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        return
    say(
        f"test accuracy: best {100 * result.best_accuracy:.2f} % (epoch {result.best_epoch}), "
        f"last {100 * result.last_accuracy:.2f} %; {result.seconds:.0f} s"
    )
    say(f"written: {folder}/{{{','.join(sorted(written(folder)))}}}")


def written(folder: Path) -> Iterable[str]:
    """What a run folder holds for people and for analysis."""
    names = ("config.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "curves.png")
    return [name for name in names if (folder / name).exists()]


def free_folder(config: TrainConfig) -> Path:
    """runs/DATA-MODEL-hHEADS-sSEED, with a number behind it where that exists."""
    heads = config.num_heads
    text = "-".join(map(str, heads)) if isinstance(heads, tuple) else heads or "std"
    base = Path("runs") / f"{config.data}-{config.model}-h{text}-s{config.seed}"
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder
