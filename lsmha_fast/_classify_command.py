"""`lsmha classify`: the likeliest labels of image files, by the model of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .data.facts import dataset_facts
from .deploy import Runner, optimize
from .deploy.images import ImageError, read_image
from .train.run import load_run, pick_device

BATCH = 64


def classify(paths: Sequence[str], run_dir: Path, *, top: int = 5, device: str = "auto") -> int:
    """Print the likeliest labels of every image; returns 1 where one could not be read, else 0.

    An image that cannot be read is one line on stderr, and the others are classified.
    """
    run = load_run(run_dir)
    names, mean, std = dataset_facts(run.config.data, run.config.tier)
    where = pick_device(device)
    size = run.model.img_size
    example = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=where)
    runner = Runner(optimize(run.model, example, mean=mean, std=std), min(BATCH, len(paths)))
    failed = False
    batch: list[tuple[str, Tensor]] = []
    for i, path in enumerate(paths, start=1):
        try:
            batch.append((path, read_image(path, size)))
        except ImageError as error:
            print(f"lsmha classify: error: {error}", file=sys.stderr, flush=True)
            failed = True
        if batch and (len(batch) == runner.max_batch or i == len(paths)):
            logits = runner(torch.stack([image for _, image in batch]))
            for line in lines_of([name for name, _ in batch], logits, names, top):
                print(line, flush=True)
            batch = []
    return int(failed)


def lines_of(paths: Sequence[str], logits: Tensor, names: Sequence[str], top: int) -> Iterator[str]:
    """One line per image: path, then labels with their probabilities, likeliest first."""
    best = logits.softmax(1).topk(min(top, logits.shape[1]), dim=1)
    for path, shares, labels in zip(paths, best.values, best.indices, strict=True):
        found = (
            f"{names[k]} {100 * p:.1f} %" for p, k in zip(shares, labels.tolist(), strict=True)
        )
        yield f"{path}: {', '.join(found)}"
