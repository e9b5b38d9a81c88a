"""The tables of a report, as rows of plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..clusters import find_clusters
from ..shp import SHP
from ..snr import signal_to_noise
from ..summary import block_numbers
from .source import Measured

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# summary.json's names of a block's numbers -> column titles; further numbers keep their own name
COLUMNS = {
    "name": "block",
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


class Table(dict):
    """`columns` and `rows` of one table; a dict so that a template reads it by name."""

    def __init__(self, columns: list[str], rows: list[list[Any]]):
        super().__init__(columns=columns, rows=rows)


def block_table(measured: Measured) -> Table:
    """One row per block with every number that was measured for it."""
    blocks = measured.summary["blocks"]
    more = [
        key
        for key, value in blocks[0].items()
        if key not in COLUMNS and isinstance(value, (int, float))
    ]
    keys = [key for key in COLUMNS if any(key in block for block in blocks)] + more
    columns = [COLUMNS.get(key, key.replace("_", " ")) for key in keys]
    return Table(columns, [[_cell(key, block.get(key)) for key in keys] for block in blocks])


def _cell(key: str, value: Any) -> Any:
    if key == "accuracy" and value is not None:
        return f"{100 * value:.2f} %"
    # `summary.json` has null for a ratio without noise
    return "no noise" if key == "snr" and value is None else value


def label_table(measured: Measured) -> Table:
    """One row per label: its images, and per block the heads that recognise it and its SNR*."""
    shp = measured.shp
    columns = ["label", "images"]
    for name in shp.block_names:
        columns += [f"heads, {name}", f"SNR*, {name}"]
    rows = []
    for k, label in enumerate(shp.class_names):
        row: list[Any] = [label, int(shp.counts[k])]
        for block in measured.clusters:
            row += [int(block["signal"][k]), float(block["unclipped"][k])]
        rows.append(row)
    return Table(columns, rows)


def head_rows(measured: Measured) -> Table:
    """One row per head of every block."""
    columns = ["block", "head", "clusters", "labels per cluster", "internal noise",
               "external noise", "noise density", "recognises"]  # fmt: skip
    names, rows = measured.shp.class_names, []
    for block_name, found in zip(measured.shp.block_names, measured.clusters, strict=True):
        external = found["column_noise"] + found["rest_noise"]
        for h in range(len(found["number"])):
            groups: dict[int, list[str]] = {}
            for label in found["order"][h].tolist():
                if (number := int(found["assignment"][h, label])) >= 0:
                    groups.setdefault(number, []).append(names[label])
            text = ", ".join("+".join(group) for group in groups.values()) or "nothing"
            rows.append([
                block_name, h + 1, int(found["number"][h]), float(found["mean_size"][h]),
                int(found["internal_noise"][h]), int(external[h]), float(found["density"][h]), text,
            ])  # fmt: skip
    return Table(columns, rows)


def sensitivity(shp: SHP, choices: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The block averages at every threshold of `THRESHOLDS` and at the one that was chosen."""
    thresholds = sorted({*THRESHOLDS, float(choices["threshold"])})
    normalize = str(choices.get("normalize", "matrix"))
    rows = []
    for name, matrices in zip(shp.block_names, shp.matrices, strict=True):
        for threshold in thresholds:
            found = find_clusters(matrices, threshold=threshold, normalize=normalize)
            numbers = block_numbers(found, signal_to_noise(matrices, found))
            rows.append({"block": name, "threshold": threshold, **numbers})
    return rows


def sensitivity_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of `sensitivity`, with the columns one compares."""
    keys = ["block", "threshold", "snr", "clusters", "cluster_size", "heads_per_label",
            "internal_noise", "external_noise"]  # fmt: skip
    columns = [COLUMNS.get(key, key) for key in keys]
    return Table(columns, [[_cell(key, row[key]) for key in keys] for row in rows])


def pairs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of a flat record, as text."""
    return [(name.replace("_", " "), _text(value)) for name, value in record.items()]


def extra_sections(extras: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Results of other commands: single values, and a table for every list of records."""
    sections = []
    for title, value in extras.items():
        record = value if isinstance(value, dict) else {"results": value}
        facts, tables = {}, []
        for name, item in record.items():
            if isinstance(item, list) and item and all(isinstance(row, dict) for row in item):
                columns = list(dict.fromkeys(key for row in item for key in row))
                rows = [[_plain(row.get(key)) for key in columns] for row in item]
                table = Table([str(c).replace("_", " ") for c in columns], rows)
                tables.append({"title": name.replace("_", " "), **table})
            elif name != "kind":
                facts[name] = item
        sections.append({"title": title, "facts": pairs(facts), "tables": tables})
    return sections


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
