"""What a report shows, read from the folders of a run and checked as a whole."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .._io import load_npz
from ..shp import SHP

CLUSTERS_KIND = "lsmha_fast.clusters/1"
SUMMARY_KIND = "lsmha_fast.report/1"
# results of other commands, shown where their file is in the run folder or in its shp folder
EXTRAS = {
    "null": "Null model",
    "sweep": "Sweep",
    "bootstrap": "Bootstrap intervals",
    "symmetry": "Symmetry breaking",
    "committee": "Soft committee",
    "pruning": "Pruning",
    "latency": "Latency",
}


@dataclass(frozen=True)
class Measured:
    """The results of one run.

    Attributes:
        summary: what `summary.json` holds.
        shp: the fields of every head.
        clusters: per block, the arrays of `clusters.npz` by name.
        extras: title -> JSON value, of the further results that are there.
        config, metrics: of the training; empty where there was none.
    """

    summary: dict[str, Any]
    shp: SHP
    clusters: list[dict[str, np.ndarray]]
    extras: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)


def read_measured(
    shp_folder: Path,
    *,
    run: Path | None = None,
    config: dict[str, Any] | None = None,
    metrics: list[dict[str, Any]] | None = None,
) -> Measured:
    """Read what `write_report` wrote, and the further results beside it.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: a file is damaged, or two files are not of one measurement.
    """
    folder = Path(shp_folder)
    if not (folder / "summary.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no single-head performance (no summary.json); run `lsmha shp` first"
        )
    summary = _read_json(folder / "summary.json")
    if not isinstance(summary, dict) or summary.get("kind") != SUMMARY_KIND:
        raise ValueError(f"{folder / 'summary.json'}: not a summary of `lsmha shp`")
    shp = SHP.load(folder / "shp.npz")
    clusters = _read_clusters(folder / "clusters.npz", shp)
    _check_summary(folder / "summary.json", summary, shp)
    extras = {title: summary[name] for name, title in EXTRAS.items() if summary.get(name)}
    for place in [folder] if run is None else [folder, Path(run)]:
        for name, title in EXTRAS.items():
            if (place / f"{name}.json").is_file():
                extras[title] = _read_json(place / f"{name}.json")
    return Measured(summary, shp, clusters, extras, config or {}, metrics or [])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not readable JSON ({error})") from error


def _read_clusters(path: Path, shp: SHP) -> list[dict[str, np.ndarray]]:
    arrays, info = load_npz(path, CLUSTERS_KIND)
    K = len(shp.class_names)
    blocks = []
    for m, sums in enumerate(shp.sums):
        H = sums.shape[1]
        tail = f".{m}"
        block = {n.removesuffix(tail): a for n, a in arrays.items() if n.endswith(tail)}
        shapes = {
            "assignment": (H, K), "order": (H, K), "number": (H,), "mean_size": (H,),
            "internal_noise": (H,), "column_noise": (H,), "rest_noise": (H,), "density": (H,),
            "signal": (K,), "unclipped": (K,),
        }  # fmt: skip
        for name, shape in shapes.items():
            found = block[name].shape if name in block else "nothing"
            if found != shape:
                raise ValueError(
                    f"{path}: {name} of block {m + 1} is {found}, expected {shape} as in shp.npz"
                )
        if (np.sort(block["order"], axis=1) != np.arange(K)).any():
            raise ValueError(f"{path}: order of block {m + 1} is not a permutation of the labels")
        blocks.append(block)
    if tuple(info.get("class_names", ())) != shp.class_names:
        raise ValueError(f"{path}: its class names are not those of shp.npz")
    return blocks


def _check_summary(path: Path, summary: dict[str, Any], shp: SHP) -> None:
    try:
        heads = [block["heads"] for block in summary["blocks"]]
        dict(summary["choices"])
        float(summary["choices"]["threshold"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a complete summary ({error!r})") from error
    found = [sums.shape[1] for sums in shp.sums]
    if heads != found:
        raise ValueError(f"{path}: {heads} heads per block, but shp.npz has {found}")
