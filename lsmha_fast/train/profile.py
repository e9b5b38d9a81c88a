"""Where the time of a training step goes: a trace for viewers and a table for people."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from .._files import atomic_file, atomic_folder
from .config import TrainConfig
from .run import build_model, check_new, load_split, pick_device
from .trainer import Trainer

WARM_UP = 3  # steps
# the first that matches the operator's name
KINDS = (
    ("attention", r"attention|flash|efficient"),
    ("stem", r"conv_stem|max_pool"),
    ("pooling", r"seq_pool"),
    # on some processors a linear map is a 1 x 1 convolution: nn/linear.py
    ("products and convolutions", r"conv|mm\b|matmul|linear|gemm"),
    ("optimizer", r"adam|optimizer|_foreach"),
    ("loss", r"cross_entropy|log_softmax|nll|isfinite|maximum"),
    ("norms", r"norm"),
    ("gelu", r"gelu"),
    ("random numbers", r"rand|bernoulli|uniform|normal_|dropout|beta"),
    ("copies and fills", r"copy|clone|contiguous|_to\b|::to\b|fill|zero|empty|cat|index|gather"),
    ("element by element", r"add|mul|div|sub|where|neg|sum|gt|ge|lt|bitwise|flip|pow|mean"),
)


def profile(config: TrainConfig, folder: Path, steps: int) -> Iterator[str]:
    """Train some steps under torch's profiler; writes trace.json.gz and profile.md, nothing else.

    Args:
        config: what to train.
        folder: a new folder.
        steps: how many steps are recorded, after as many without the profiler for their time.

    Raises:
        ValueError: fewer than one step, a folder that holds something, bad data or model.
    """
    if steps < 1:
        raise ValueError(f"--profile must be at least 1, got {steps}")
    check_new(folder)
    device = pick_device(config.device)
    train_set, test_set = load_split(config, "train"), load_split(config, "test")
    model = build_model(config, len(train_set.class_names)).to(device)
    trainer = Trainer(config, model, train_set, test_set, device)
    run_steps(trainer, WARM_UP)
    start = time.perf_counter()
    run_steps(trainer, steps)
    wall = (time.perf_counter() - start) / steps
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as prof:
        run_steps(trainer, steps)
    lines = [
        f"{config.model}, heads {config.num_heads or 'as published'}, batch {config.batch_size}, "
        f"pipeline {config.pipeline}, on {device}: {1000 * wall:.2f} ms a step without the "
        f"profiler, {config.batch_size / wall:,.0f} images/s",
        "",
        *table(group_times(prof.events(), device.type), steps),
    ]
    with atomic_folder(folder) as part:
        prof.export_chrome_trace(str(part / "trace.json.gz"))
        with atomic_file(part / "profile.md") as page:
            page.write_text("\n".join([*lines, ""]))
    yield from lines
    yield f"written: {folder}/{{profile.md,trace.json.gz}}"


def run_steps(trainer: Trainer, count: int) -> None:
    """Train `count` steps, over the ends of epochs, and wait for the device."""
    trainer.forward.train()
    while count:
        batches = iter(trainer.batches.epoch(trainer.epoch, trainer.step))
        while count and trainer.step < len(trainer.batches):
            with record_function("phase: input"):
                images, targets = next(batches)
            with record_function("phase: step"):
                trainer.train_step(images, targets)
            trainer.step += 1
            count -= 1
        if trainer.step == len(trainer.batches):
            trainer.epoch, trainer.step = trainer.epoch + 1, 0
    trainer.bad.check_now()


def group_times(events: Any, device: str) -> dict[tuple[str, str], float]:
    """Microseconds by (phase, kind): every operator's own time, on the device that it ran on."""
    times: dict[tuple[str, str], float] = {}
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: counted with the operator that launched it
        own = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        key = (phase(event), kind(event.name))
        times[key] = times.get(key, 0.0) + own
    return times


def phase(event: Any) -> str:
    """Input, forward, backward or optimizer: by what the operator was called from."""
    while event is not None:
        if event.name.startswith("autograd::engine"):
            return "backward"
        if event.name.startswith("Optimizer.step"):
            return "optimizer"
        if event.name == "phase: input":
            return "input"
        event = event.cpu_parent
    return "forward"


def kind(name: str) -> str:
    """What sort of work an operator does."""
    for label, pattern in KINDS:
        if re.search(pattern, name, re.IGNORECASE):
            return label
    return "Python and other"


def table(times: dict[tuple[str, str], float], steps: int) -> list[str]:
    """Markdown: milliseconds of a step by kind and phase, the largest first."""
    phases = ("input", "forward", "backward", "optimizer")
    total = sum(times.values()) or 1.0
    kinds = sorted({k for _, k in times}, key=lambda k: -sum(times.get((p, k), 0) for p in phases))
    lines = ["| ms a step | " + " | ".join(phases) + " | share |", "|---" * 6 + "|"]
    for label in (*kinds, "all"):
        chosen = kinds if label == "all" else [label]
        values = [sum(times.get((p, k), 0.0) for k in chosen) for p in phases]
        cells = [f"{value / steps / 1000:.2f}" for value in values]
        lines.append(f"| {label} | {' | '.join(cells)} | {100 * sum(values) / total:.1f} % |")
    return lines
