"""What stands beside the numbers reaches the summary, the JSON record and the folder."""

import json

import pytest
import torch
from tiny_model import TinyModel, random_batches, random_probes

from lsmha_fast import analysis


@pytest.fixture
def result():
    torch.manual_seed(0)
    model = TinyModel()
    probes, batches = random_probes(model), random_batches()
    shp = analysis.single_head_performance(model, probes, batches)
    clusters = [analysis.find_clusters(m, threshold=0.6, normalize="row") for m in shp.matrices]
    snrs = [analysis.signal_to_noise(m, c) for m, c in zip(shp.matrices, clusters, strict=True)]
    null = analysis.measure_null(model, probes, batches, draws=2)
    return probes, shp, clusters, snrs, analysis.measure_details(shp, clusters, null=null)


def test_every_part_is_that_of_the_block(result):
    _, shp, clusters, _, details = result
    for m, block in enumerate(details):
        alone = analysis.bootstrap_snr(shp.matrices[m], clusters[m])
        assert block.intervals.mean_unclipped == alone.mean_unclipped
        assert block.sweep.normalize == "row"
        assert {kind: len(draws) for kind, draws in block.null.items()} == {
            "labels": 2,
            "probes": 2,
        }
        assert block.symmetry.label_by_head.shape == (4, len(shp.matrices[m]))


def test_summary_and_folder_hold_them(result, tmp_path, monkeypatch):
    monkeypatch.setattr("lsmha_fast.analysis.report.plot_shp", lambda *_, **__: [])
    analysis.write_report(tmp_path / "shp", *result, title="t")
    text = (tmp_path / "shp" / "summary.txt").read_text()
    for words in ("of bootstrap over heads", "null, permuted labels", "sharing out", "threshold"):
        assert text.count(words) >= 2, words  # once per block
    record = json.loads((tmp_path / "shp" / "summary.json").read_text())
    for block in record["blocks"]:
        assert len(block["sweep"]["snr"]) == len(block["sweep"]["thresholds"]) == 8
        assert len(block["bootstrap"]["snr_unclipped_by_label"]) == 4
        low, high = block["bootstrap"]["snr_unclipped"]
        assert low <= block["snr_unclipped"] <= high
        assert len(block["null"]["probes"]) == 2
        assert len(block["symmetry"]["head_entropy"]) == block["heads"]


def test_without_details_the_summary_is_shorter(result):
    *measured, details = result
    short, long = analysis.summarize(*measured), analysis.summarize(*measured, details)
    assert set(short) < set(long)


def test_labels_without_images_are_told(result):
    model = TinyModel()
    probes = random_probes(model)
    batches = [(torch.randn(6, 8, 6), torch.tensor([0, 1, 3, 0, 1, 3]))]
    shp = analysis.single_head_performance(model, probes, batches)
    clusters = [analysis.find_clusters(m) for m in shp.matrices]
    snrs = [analysis.signal_to_noise(m, c) for m, c in zip(shp.matrices, clusters, strict=True)]
    assert all(s.snr[2] == s.unclipped[2] == 0 for s in snrs)
    assert not any(c.recognized[:, 2].any() for c in clusters)
    lines = analysis.summarize(probes, shp, clusters, snrs)
    assert any(line.startswith("1 labels have no images") for line in lines)
