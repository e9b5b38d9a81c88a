"""Training: config, schedule, checkpoints, loop. Names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from .config import TrainConfig as TrainConfig
    from .loop import RunOptions as RunOptions
    from .loop import RunResult as RunResult
    from .loop import train as train
    from .presets import PRESETS as PRESETS
    from .presets import preset as preset
    from .run import Run as Run
    from .run import load_run as load_run

_HOMES = {
    "TrainConfig": "config",
    "PRESETS": "presets",
    "preset": "presets",
    "RunOptions": "loop",
    "RunResult": "loop",
    "train": "loop",
    "Run": "run",
    "load_run": "run",
}
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
