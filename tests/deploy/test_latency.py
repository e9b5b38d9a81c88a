"""Percentiles, what is measured, what is left out, the record and the picture."""

import json

import pytest
import torch

from lsmha_fast import create_model
from lsmha_fast._latency_command import (
    LatencyOptions,
    Point,
    latency_of_model,
    pareto_front,
    plot_pareto,
    table,
)
from lsmha_fast.deploy.latency import Budget, measure, percentile
from lsmha_fast.deploy.published import with_published_attention
from lsmha_fast.deploy.variants import VARIANTS, Unavailable

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return create_model("cct_2_3x2_16", 10, num_heads=8, dim=32).eval()


def test_percentiles():
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, q) for q in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([7.0], 0.99) == 7.0


def test_published_attention_is_the_same_function(model):
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(with_published_attention(model)(images), model(images))


def test_measures_what_was_asked_for(model):
    names = ["optimized", "eager", "published"]
    rows, skipped = measure(model, [2, 1], [torch.float32], names, CPU, Budget(0.02))
    assert [(r.variant, r.batch) for r in rows] == [(n, b) for b in (1, 2) for n in names]
    assert skipped == []
    for row in rows:
        assert 0 < row.p50_ms <= row.p95_ms <= row.p99_ms
        assert row.images_per_s == pytest.approx(1e3 * row.batch / row.p50_ms)
        assert row.calls >= 15
        assert row.error < 1e-5


def test_what_cannot_run_or_would_take_too_long_is_named(model, monkeypatch):
    def unavailable(*_):
        raise Unavailable("not today")

    monkeypatch.setattr("lsmha_fast.deploy.latency.VARIANTS", {**VARIANTS, "eager": unavailable})
    budget = Budget(0.02, longest_call=1e-9)
    rows, skipped = measure(model, [1, 4], [torch.float32], ["optimized", "eager"], CPU, budget)
    assert [(r.variant, r.batch) for r in rows] == [("optimized", 1)]
    reasons = {(s.variant, s.batch): s.reason for s in skipped}
    assert reasons["eager", 1] == reasons["eager", 4] == "not today"
    assert "a call would take" in reasons["optimized", 4]
    lines = list(table(rows, skipped))
    assert "not measured: not today" in lines[2]


def test_unknown_variants_are_named(model):
    with pytest.raises(ValueError, match="unknown variant 'fast'; choose from optimized"):
        measure(model, [1], [torch.float32], ["fast"], CPU)


def test_record(model, tmp_path):
    options = LatencyOptions(batches=(1,), variants=("optimized", "published"), seconds=0.02)
    lines = list(latency_of_model("small", model, options, tmp_path / "latency"))
    assert any("published" in line for line in lines)
    record = json.loads((tmp_path / "latency" / "summary.json").read_text())
    assert {"device", "dtype", "rows", "command", "versions", "clock", "model"} <= set(record)
    keys = {"variant", "batch", "p50_ms", "p95_ms", "p99_ms", "images_per_s"}
    assert all(keys <= set(row) for row in record["rows"])


def test_pareto_front_and_picture(tmp_path):
    a, b, c, d = (
        Point("a", 0.7, 1.0),
        Point("b", 0.6, 2.0),
        Point("c", 0.9, 3.0),
        Point("d", 0.7, 1),
    )
    assert pareto_front([c, b, d, a]) in ([a, c], [d, c])
    plot_pareto([a, b, c], tmp_path / "pareto.png", "digits")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
