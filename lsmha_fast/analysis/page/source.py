"""What a page shows, read from the folders of a run and checked before anything is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..clusters import Clusters, find_clusters
from ..shp import SHP
from ..snr import SNR, signal_to_noise
from ..summary import block_numbers

SUMMARY_KIND = "lsmha_fast.report/1"
COMMITTEE_KIND = "lsmha_fast.committee/1"


@dataclass(frozen=True)
class Measured:
    """The results of one run.

    Attributes:
        summary: what `summary.json` of `lsmha shp` holds.
        shp: the fields of every head.
        clusters, snrs: per block, found again in `shp` with the summary's own choices.
        config, metrics: of the training; empty where there was none.
        committee, prune, latency: what `summary.json` of those commands holds; None where missing.
    """

    summary: dict[str, Any]
    shp: SHP
    clusters: list[Clusters]
    snrs: list[SNR]
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    committee: dict[str, Any] | None = None
    prune: dict[str, Any] | None = None
    latency: dict[str, Any] | None = None


def read_measured(
    run: Path,
    *,
    shp: Path | None = None,
    committee: Path | None = None,
    config: dict[str, Any] | None = None,
    metrics: list[dict[str, Any]] | None = None,
) -> Measured:
    """Read what `lsmha shp` wrote, and the results of other commands that are there.

    Args:
        run: the run folder; pruning and latency are looked for in its folders of those names.
        shp: folder of `lsmha shp`; by default `run / "shp"`.
        committee: folder of `lsmha committee`; by default `committee` beside or in `run`, if the
            run is one of its members.
        config, metrics: of the training.

    Raises:
        FileNotFoundError: there are no results, or none at a place that was named.
        ValueError: a file is damaged or holds something else, or two are not of one measurement.
    """
    folder = run / "shp" if shp is None else shp
    path = folder / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no single-head performance (no summary.json); run `lsmha shp` first"
        )
    summary = _read_object(path)
    if summary.get("kind") != SUMMARY_KIND:
        raise ValueError(f"{path}: not a summary of `lsmha shp`")
    fields = SHP.load(folder / "shp.npz")
    clusters, snrs = _read_again(path, summary, fields)
    return Measured(
        summary,
        fields,
        clusters,
        snrs,
        config or {},
        metrics or [],
        _read_committee(run, committee),
        _read_extra(run / "prune", _check_prune),
        _read_extra(run / "latency", _check_latency),
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_again(path: Path, summary: dict[str, Any], shp: SHP) -> tuple[list[Clusters], list[SNR]]:
    """Clusters and ratios of every block, which must be those of the summary."""
    try:
        blocks, choices = summary["blocks"], summary["choices"]
        options = {"threshold": float(choices["threshold"]), "normalize": choices["normalize"]}
        names = [block["name"] for block in blocks]
        noise = [float(block["external_noise"]) for block in blocks]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a complete summary ({error!r})") from error
    if names != list(shp.block_names):
        raise ValueError(f"{path}: its blocks {names} are not those of shp.npz")
    clusters, snrs = [], []
    for m, name in enumerate(names):
        matrices = shp.matrix(m)  # not kept: at many labels all of them are large
        clusters.append(find_clusters(matrices, **options))
        snrs.append(signal_to_noise(matrices, clusters[m]))
        found = block_numbers(clusters[m], snrs[m])["external_noise"]
        if found is None or not math.isclose(found, noise[m], rel_tol=1e-6, abs_tol=1e-9):
            raise ValueError(f"{path}: noise {noise[m]:g} in {name}, but shp.npz has {found:g}")
    return clusters, snrs


def _read_committee(run: Path, named: Path | None) -> dict[str, Any] | None:
    if named is not None:
        path = named / "summary.json"
        if not path.is_file():
            raise FileNotFoundError(f"{named} holds no committee (no summary.json)")
        record = _read_object(path)
        if record.get("kind") != COMMITTEE_KIND:
            raise ValueError(f"{path}: not a summary of `lsmha committee`")
        return _checked(path, record, _check_committee)
    for folder in (run / "committee", run.resolve().parent / "committee"):
        path = folder / "summary.json"
        if not path.is_file():
            continue
        record = _read_object(path)
        members = [Path(str(name)).name for name in record.get("names", ())]
        if record.get("kind") == COMMITTEE_KIND and run.resolve().name in members:
            return _checked(path, record, _check_committee)
    return None


def _read_extra(folder: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
    path = folder / "summary.json"
    return _checked(path, _read_object(path), check) if path.is_file() else None


def _checked(path: Path, record: dict[str, Any], check) -> dict[str, Any]:
    try:
        check(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a complete record ({error!r})") from error
    return record


def _check_committee(record: dict[str, Any]) -> None:
    for entries in record["sizes"].values():
        for entry in entries:
            if int(entry["size"]) < 1 or entry["kind"] not in ("all", "distinct", "equal"):
                raise ValueError(f"a committee of kind {entry['kind']!r}")
            _ = [float(entry[name]) for name in ("mean", "lowest", "highest")]
    for entries in record["comparisons"].values():
        for entry in entries:
            _ = [float(entry[name]) for name in ("difference", "low", "high", "p_value")]
            _ = entry["what"]
    _ = list(zip(record["names"], record["groups"], map(float, record["members"]), strict=True))


def _check_prune(record: dict[str, Any]) -> None:
    for row in record["rows"]:
        _ = row["method"], float(row["removed"])
        _ = float(row["accuracy_before"]), float(row["accuracy_after"])


def _check_latency(record: dict[str, Any]) -> None:
    for row in record["rows"]:
        _ = row["variant"], int(row["batch"]), float(row["p50_ms"])
