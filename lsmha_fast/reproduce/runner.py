"""Execute the runs of a manifest: finished ones are skipped, broken ones go on."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .._train_command import config_flags
from ..train.run import holds_run, read_metrics
from ..train.signals import StopFlag, stop_flag
from .manifests import PlannedRun


def is_finished(folder: Path, run: PlannedRun) -> bool:
    """Whether the folder holds this run, trained to its end.

    Raises:
        ValueError: the folder holds another run, or something else.
    """
    if not holds_run(folder, run.config):
        return False
    rows = read_metrics(folder)
    weights = (folder / "last.safetensors").is_file()
    return bool(rows) and rows[-1]["epoch"] == run.config.total_epochs and weights


def visible_gpus() -> list[str]:
    """The GPUs of this process, by the names that CUDA_VISIBLE_DEVICES gives them, if it does."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = named.split(",") if named else map(str, range(torch.cuda.device_count()))
    return list(names)[: torch.cuda.device_count()]


def execute(
    runs: Sequence[PlannedRun],
    out: Path,
    *,
    jobs: int,
    gpus: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Train all runs in processes of their own, `jobs` at a time, each on a GPU where there are.

    Args:
        runs: what to train, into `out`/runs/NAME; their output goes to `out`/logs/NAME.log.
        out: folder of the manifest.
        jobs: processes at a time.
        gpus: the GPUs to use, in turn, as CUDA_VISIBLE_DEVICES names them; empty on a CPU.
        say: takes lines for people.

    Raises:
        KeyboardInterrupt: after SIGINT or SIGTERM; all runs have saved and can go on.
    """
    waiting: queue.SimpleQueue[PlannedRun] = queue.SimpleQueue()
    for run in runs:
        if is_finished(out / "runs" / run.name, run):
            say(f"{run.name}: finished before")
        else:
            waiting.put(run)
    with stop_flag() as stop:
        workers = [
            threading.Thread(
                target=_work,
                args=(waiting, out, gpus[i % len(gpus)] if gpus else None, stop, say),
            )
            for i in range(jobs)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if stop.raised():
            say("stopped; the same command goes on")
            raise KeyboardInterrupt


def _work(
    waiting: queue.SimpleQueue[PlannedRun],
    out: Path,
    gpu: str | None,
    stop: StopFlag,
    say: Callable[[str], None],
) -> None:
    """Train one run after the other until none is left or a stop is asked for."""
    environment = dict(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    while not stop.raised():
        try:
            run = waiting.get_nowait()
        except queue.Empty:
            return
        say(f"{run.name}: training" + ("" if gpu is None else f" on GPU {gpu}"))
        code = _train(run, out, environment, stop)
        if code and not stop.raised():
            say(f"{run.name}: failed with exit code {code}, see {out}/logs/{run.name}.log")


def _train(run: PlannedRun, out: Path, environment: dict[str, str], stop: StopFlag) -> int:
    """Train one run in a process; a stop is passed on to it."""
    folder, log = out / "runs" / run.name, out / "logs" / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lsmha_fast", "train", "--auto-resume", f"--out={folder}"]
    with log.open("a") as file:
        process = subprocess.Popen(
            [*command, *config_flags(run.config)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if stop.raised():
                    process.terminate()
