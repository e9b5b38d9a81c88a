"""The charts of a page, by section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ..null import TITLES, null_means
from .charts import Series, line_chart
from .source import Measured
from .tables import KINDS

NO_VALUE = "A gap is a ratio without noise."
FEWER_HEADS = "Its band lies low: a resample has fewer different heads to average over."


def training_charts(rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Accuracy and losses by epoch."""
    if not rows:
        return []
    epochs = [row["epoch"] for row in rows]
    losses = [
        Series(name, [row.get(key) for row in rows])
        for name, key in (("training", "train_loss"), ("test", "test_loss"))
    ]
    accuracy = [Series("test", [row["test_accuracy"] for row in rows])]
    return [
        line_chart("Test accuracy", epochs, accuracy, x_title="epoch", percent=True),
        line_chart("Loss", epochs, losses, x_title="epoch"),
    ]


def block_charts(measured: Measured) -> list[Markup]:
    """Accuracy, ratios, noise and clusters by block, each beside its null models."""
    blocks = measured.summary["blocks"]
    names = [str(block["name"]) for block in blocks]
    x = list(range(1, len(blocks) + 1))

    def chart(title: str, series: list[Series], note: str = "", **options: Any) -> Markup:
        gaps = any(value is None for s in series for value in s.values)
        note = " ".join(filter(None, [NO_VALUE if gaps else "", note]))
        return line_chart(title, x, series, x_title="block", x_names=names, note=note, **options)

    def beside(title: str, key: str, note: str = "") -> Markup:
        pairs = [(block.get("bootstrap") or {}).get(key) for block in blocks]
        intervals = [pair or (None, None) for pair in pairs] if any(pairs) else None
        series = [Series("measured", [block.get(key) for block in blocks], intervals)]
        for kind, text in TITLES.items():
            draws = [(block.get("null") or {}).get(kind) for block in blocks]
            if any(draws):
                means = [null_means(d)[key] if d else None for d in draws]
                spread = [_spread([one[key] for one in d or ()]) for d in draws]
                series.append(Series(text, means, spread))
        return chart(title, series, note)

    accuracy = [Series("probe", [block.get("accuracy") for block in blocks])]
    whole = measured.summary.get("model_accuracy")
    if whole is not None:
        accuracy.append(Series("whole model", [whole] * len(blocks)))
    return [
        chart("Accuracy of the probes", accuracy, percent=True, from_zero=False),
        beside("Signal-to-noise ratio", "snr"),
        beside("SNR*, without a threshold", "snr_unclipped", FEWER_HEADS),
        beside("External noise per head (elements)", "external_noise"),
        beside("Internal noise per head (elements)", "internal_noise"),
        beside("Clusters per head", "clusters"),
        beside("Labels per cluster", "cluster_size"),
    ]


def _spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if len(known) == len(values) > 0 else (None, None)


def sweep_charts(measured: Measured) -> list[Markup]:
    """The averages of every block against the threshold."""
    blocks = measured.summary["blocks"]
    if not all(block.get("sweep") for block in blocks):
        return []
    x = blocks[0]["sweep"]["thresholds"]

    def chart(title: str, key: str) -> Markup:
        series = [Series(str(block["name"]), block["sweep"][key]) for block in blocks]
        note = NO_VALUE if any(v is None for s in series for v in s.values) else ""
        return line_chart(title, x, series, x_title="threshold", note=note)

    return [
        chart("Signal-to-noise ratio", "snr"),
        chart("Clusters per head", "clusters"),
        chart("Labels per cluster", "cluster_size"),
        chart("External noise per head (elements)", "external_noise"),
    ]


def committee_charts(record: Mapping[str, Any]) -> list[Markup]:
    """Accuracy against the number of members, one chart per combination."""
    charts = []
    for combination, entries in record["sizes"].items():
        sizes = sorted({entry["size"] for entry in entries})
        series = []
        for kind, text in KINDS.items():
            of_size = {entry["size"]: entry for entry in entries if entry["kind"] == kind}
            if of_size:
                found = [of_size.get(size) for size in sizes]
                ranges = [(e["lowest"], e["highest"]) if e else (None, None) for e in found]
                means = [e["mean"] if e else None for e in found]
                series.append(Series(text, means, ranges if kind == "all" else None))
        title = f"Mean {combination}"
        charts.append(
            line_chart(title, sizes, series, x_title="members", percent=True, from_zero=False)
        )
    return charts


def prune_charts(record: Mapping[str, Any]) -> list[Markup]:
    """Accuracy against what was removed, one line per method, seeds averaged."""
    rows = record["rows"]
    removed = sorted({float(row["removed"]) for row in rows})
    charts = []
    for title, key in (("After pruning", "accuracy_after"), ("Fine-tuned", "accuracy_finetuned")):
        series = []
        for method in dict.fromkeys(str(row["method"]) for row in rows):
            mine = [row for row in rows if str(row["method"]) == method]
            values = [
                [r[key] for r in mine if float(r["removed"]) == at and r.get(key) is not None]
                for at in removed
            ]
            ends = [_spread(v) for v in values]
            means = [sum(v) / len(v) if v else None for v in values]
            series.append(Series(method, means, ends if any(len(v) > 1 for v in values) else None))
        if any(value is not None for s in series for value in s.values):
            charts.append(line_chart(title, removed, series, x_title="removed", percent=True))
    return charts


def latency_charts(record: Mapping[str, Any]) -> list[Markup]:
    """Median milliseconds per image against the batch, one line per variant."""
    rows = record["rows"]
    batches = sorted({int(row["batch"]) for row in rows})
    series = []
    several = len({row.get("dtype") for row in rows}) > 1
    variants: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        name = f"{row['variant']} {row.get('dtype')}" if several else str(row["variant"])
        variants.setdefault(name, {})[int(row["batch"])] = row
    for variant, of_batch in variants.items():
        values = [float(of_batch[b]["p50_ms"]) / b if b in of_batch else None for b in batches]
        series.append(Series(variant, values))
    names = [str(batch) for batch in batches]
    x = list(range(len(batches)))
    title = "Median milliseconds per image"
    return [line_chart(title, x, series, x_title="batch", x_names=names)] if rows else []
