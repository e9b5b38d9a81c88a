"""The charts of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from .charts import line_chart
from .source import Measured


def figures(measured: Measured, sweep: Sequence[dict[str, Any]]) -> dict[str, list[Markup]]:
    """Charts by section: "training", "blocks", "sweep". A section without data is empty.

    `sweep` holds the rows of `sensitivity`.
    """
    return {
        "training": _training(measured.metrics),
        "blocks": _blocks(measured),
        "sweep": _sweep(measured, sweep),
    }


def _training(rows: Sequence[dict[str, Any]]) -> list[Markup]:
    if not rows:
        return []
    epochs = [row["epoch"] for row in rows]
    losses = {
        name: [row.get(key) for row in rows]
        for name, key in (("training", "train_loss"), ("test", "test_loss"))
    }
    accuracy = {"test": [row.get("test_accuracy") for row in rows]}
    return [
        line_chart("Test accuracy", epochs, accuracy, x_title="epoch", percent=True),
        line_chart("Loss", epochs, losses, x_title="epoch"),
    ]


def _blocks(measured: Measured) -> list[Markup]:
    blocks = measured.summary["blocks"]
    names = [str(block["name"]) for block in blocks]
    x = list(range(1, len(blocks) + 1))
    whole = measured.summary.get("model_accuracy")

    def chart(title: str, keys: dict[str, str], **options: Any) -> Markup:
        series = {name: [block.get(key) for block in blocks] for name, key in keys.items()}
        if options.get("percent") and whole is not None:
            series["whole model"] = [whole] * len(blocks)
        return line_chart(title, x, series, x_title="block", x_names=names, **options)

    noise = {"internal": "internal_noise", "external": "external_noise"}
    return [
        chart("Accuracy of the probes", {"probe": "accuracy"}, percent=True),
        chart("Signal-to-noise ratio", {"SNR": "snr"}),
        chart("SNR without threshold", {"SNR*": "snr_unclipped"}),
        chart("Noise per head (elements)", noise),
        chart("Clusters per head", {"clusters": "clusters"}),
        chart("Labels per cluster", {"size": "cluster_size"}),
    ]


def _sweep(measured: Measured, rows: Sequence[dict[str, Any]]) -> list[Markup]:
    x = sorted({row["threshold"] for row in rows})

    def chart(title: str, key: str) -> Markup:
        series = {
            name: [row[key] for row in rows if row["block"] == name]
            for name in measured.shp.block_names
        }
        return line_chart(title, x, series, x_title="threshold")

    return [
        chart("SNR", "snr"),
        chart("Clusters per head", "clusters"),
        chart("Labels per cluster", "cluster_size"),
        chart("External noise per head", "external_noise"),
    ]
