"""The tables of a page: cells with their text and, for sorting, their number."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..null import TITLES, null_means
from .charts import digits, number_text
from .source import Measured

# summary.json's names of a block's numbers -> column titles
COLUMNS = {
    "accuracy": "probe accuracy",
    "heads": "heads",
    "snr": "SNR",
    "snr_unclipped": "SNR*",
    "heads_per_label": "heads per label",
    "noise_per_pair": "noise per pair",
    "clusters": "clusters per head",
    "cluster_size": "labels per cluster",
    "internal_noise": "internal noise",
    "external_noise": "external noise",
    "column_noise": "of it in columns",
    "rest_noise": "of it elsewhere",
    "density": "noise density",
}
COMPARED = ("snr", "snr_unclipped", "clusters", "cluster_size", "internal_noise", "external_noise")


class Cell(NamedTuple):
    """A number as it is shown and as it is sorted; without a value it is sorted last."""

    text: str
    value: float | None


class Table(NamedTuple):
    """Cells are `Cell`s or plain text; the first of a row names the row."""

    caption: str
    columns: list[str]
    rows: list[list[Cell | str]]


def number(value: float | int | None, *, none: str | None = None) -> Cell:
    """A cell with a number; `none` is shown where there is none."""
    if value is None or math.isnan(value):
        return Cell(number_text(value) if none is None else none, None)
    whole = isinstance(value, int) or not math.isfinite(value)
    return Cell(number_text(value) if whole else digits(value), float(value))


def percent(value: float | None) -> Cell:
    """A cell with a share 0..1."""
    return Cell("\u2013", None) if value is None else Cell(f"{100 * value:.2f} %", float(value))


def ratio(value: float | None) -> Cell:
    """A cell with a ratio, which summary.json has as null where there is no noise."""
    return number(value, none="no noise")


def block_table(measured: Measured) -> Table:
    """One row per block with every number that was measured for it."""
    blocks = measured.summary["blocks"]
    rows: list[list[Cell | str]] = []
    for block in blocks:
        row: list[Cell | str] = [str(block["name"])]
        for key in COLUMNS:
            make = percent if key == "accuracy" else ratio if key == "snr" else number
            row.append(make(block.get(key)))
        rows.append(row)
    return Table("Averages by block", ["block", *COLUMNS.values()], rows)


def null_table(measured: Measured) -> Table | None:
    """One row per block and quantity: measured, its interval, and the mean of each null model."""
    blocks = measured.summary["blocks"]
    kinds = [kind for kind in TITLES if any(kind in (b.get("null") or {}) for b in blocks)]
    if not kinds and not any(b.get("bootstrap") for b in blocks):
        return None
    columns = ["block", "quantity", "measured", "interval", *(TITLES[kind] for kind in kinds)]
    rows: list[list[Cell | str]] = []
    for block in blocks:
        means = {kind: null_means(draws) for kind, draws in (block.get("null") or {}).items()}
        for key in COMPARED:
            pair = (block.get("bootstrap") or {}).get(key)
            between = " to ".join(number(end, none="infinite").text for end in pair) if pair else ""
            beside = [number(means.get(kind, {}).get(key)) for kind in kinds]
            first = ratio if key == "snr" else number
            rows.append([str(block["name"]), COLUMNS[key], first(block.get(key)), between, *beside])
    return Table("Beside the null models", columns, rows)


def label_table(measured: Measured) -> Table:
    """One row per label: its images, and per block the heads that recognise it and its SNR*."""
    shp = measured.shp
    columns = ["label", "images"]
    for name in shp.block_names:
        columns += [f"heads, {name}", f"SNR*, {name}"]
    rows: list[list[Cell | str]] = []
    for k, label in enumerate(shp.class_names):
        row: list[Cell | str] = [label, number(int(shp.counts[k]))]
        for snr in measured.snrs:
            row += [number(int(snr.signal[k])), number(float(snr.unclipped[k]))]
        rows.append(row)
    return Table("Labels: heads that recognise them, and SNR*", columns, rows)


def head_table(measured: Measured) -> Table:
    """One row per head of every block."""
    columns = ["block", "head", "clusters", "labels per cluster", "internal noise",
               "external noise", "noise density", "recognises"]  # fmt: skip
    names = measured.shp.class_names
    rows: list[list[Cell | str]] = []
    for block_name, found in zip(measured.shp.block_names, measured.clusters, strict=True):
        for h in range(len(found.number)):
            groups = ["+".join(names[k] for k in cluster) for cluster in found.labels(h)]
            values = (h + 1, int(found.number[h]), float(found.mean_size[h]),
                      int(found.internal_noise[h]), int(found.external_noise[h]),
                      float(found.density[h]))  # fmt: skip
            rows.append([block_name, *map(number, values), ", ".join(groups) or "nothing"])
    return Table("All heads", columns, rows)


def sharing_table(measured: Measured) -> Table | None:
    """One row per block: how its heads share the labels out."""
    columns = ["block", "entropy of a head over labels", "entropy of a label over heads",
               "labels two heads share", "the same by chance", "heads without a label",
               "labels without a head"]  # fmt: skip
    rows: list[list[Cell | str]] = []
    for block in measured.summary["blocks"]:
        found = block.get("symmetry")
        if not found:
            return None
        means = (sum(found[name]) / len(found[name]) for name in ("head_entropy", "label_entropy"))
        shares = (percent(found[name]) for name in ("mean_overlap", "chance_overlap"))
        counts = (number(found[name]) for name in ("silent_heads", "lost_labels"))
        rows.append([str(block["name"]), *map(number, means), *shares, *counts])
    return Table("Sharing out by block", columns, rows)


def sweep_table(measured: Measured) -> Table | None:
    """One row per block and threshold."""
    keys = ("snr", "clusters", "cluster_size", "heads_per_label", "internal_noise",
            "external_noise")  # fmt: skip
    rows: list[list[Cell | str]] = []
    for block in measured.summary["blocks"]:
        sweep = block.get("sweep")
        if not sweep:
            return None
        for i, threshold in enumerate(sweep["thresholds"]):
            values = [(ratio if key == "snr" else number)(sweep[key][i]) for key in keys]
            rows.append([str(block["name"]), Cell(f"{threshold:g}", threshold), *values])
    columns = ["block", "threshold", *(COLUMNS[key] for key in keys)]
    return Table("Averages by threshold", columns, rows)


def committee_tables(record: Mapping[str, Any]) -> list[Table]:
    """Members, committees by size, and differences with their intervals."""
    members = zip(record["names"], record["groups"], record["members"], strict=True)
    rows: list[list[Cell | str]] = [[str(n), str(g), percent(a)] for n, g, a in members]
    tables = [Table("Members", ["run", "architecture", "accuracy"], rows)]
    rows = []
    for combination, entries in record["sizes"].items():
        for e in entries:
            shares = [percent(e[name]) for name in ("mean", "lowest", "highest")]
            rows.append([str(combination), number(e["size"]), KINDS[e["kind"]], *shares])
    columns = ["mean of", "members", "which", "mean accuracy", "lowest", "highest"]
    tables.append(Table("Committees by size", columns, rows))
    rows = []
    for combination, entries in record["comparisons"].items():
        for e in entries:
            points = [
                Cell(f"{100 * e[name]:+.2f}", e[name]) for name in ("difference", "low", "high")
            ]
            rows.append([str(combination), str(e["what"]), *points, number(e["p_value"])])
    columns = ["mean of", "difference", "points", "from", "to", "p"]
    return [*tables, Table("Differences, paired bootstrap over images", columns, rows)]


KINDS = {
    "all": "all subsets",
    "distinct": "different architectures",
    "equal": "seeds of one architecture",
}


def prune_table(record: Mapping[str, Any]) -> Table:
    """The rows of `lsmha prune`."""
    names = {
        "method": "method", "seed": "seed", "removed": "removed", "total": "of",
        "kept_per_block": "kept",
        "accuracy_before": "accuracy before", "accuracy_after": "after",
        "accuracy_finetuned": "fine-tuned", "ms_before": "ms before", "ms_after": "ms after",
        "macs_before": "MACs before", "macs_after": "MACs after",
        "uncovered": "labels that lost their heads",
    }  # fmt: skip
    return record_table("Every pruned model", record["rows"], names)


def latency_tables(record: Mapping[str, Any]) -> list[Table]:
    """The rows of `lsmha latency`, and what it could not measure."""
    names = {
        "variant": "variant", "dtype": "dtype", "batch": "batch", "p50_ms": "median ms",
        "p95_ms": "95 % ms", "p99_ms": "99 % ms", "images_per_s": "images/s", "calls": "calls",
        "error": "error of the logits",
    }  # fmt: skip
    skipped = {"variant": "variant", "dtype": "dtype", "batch": "batch", "reason": "reason"}
    return [
        record_table("Every measurement", record["rows"], names),
        record_table("Not measured", record.get("skipped") or [], skipped),
    ]


def record_table(
    caption: str, records: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> Table:
    """One row per record; `names` gives the column titles, columns nobody has are left out."""
    keys = [key for key in names if any(record.get(key) is not None for record in records)]
    rows = [[_cell(key, record.get(key)) for key in keys] for record in records]
    return Table(caption, [names[key] for key in keys], rows)


def _cell(key: str, value: Any) -> Cell | str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return percent(value) if key.startswith("accuracy") else number(value)
    return str(value)


def pairs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of a flat record, as text."""
    return [(name.replace("_", " "), _text(value)) for name, value in record.items()]


def _text(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
