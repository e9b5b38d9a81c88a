"""The report folder: whole or not there, pictures that show something, text one can read."""

import json

import numpy as np
import pytest
import torch
from tiny_model import TinyModel, random_batches, random_probes

from lsmha_fast import analysis
from lsmha_fast.analysis import plots


def measured(num_classes=4, names=None, shapes=((3, 4), (5, 2))):
    model = TinyModel(num_classes, shapes)
    probes = random_probes(model, num_classes=num_classes)
    batches = random_batches(sizes=(num_classes, 9), num_classes=num_classes)
    probes = analysis.evaluate_probes(model, probes, batches)
    shp = analysis.single_head_performance(model, probes, batches, class_names=names)
    clusters = [analysis.find_clusters(m) for m in shp.matrices]
    snrs = [analysis.signal_to_noise(m, c) for m, c in zip(shp.matrices, clusters, strict=True)]
    return probes, shp, clusters, snrs


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    return measured(names=["cat", "dog", "sea horse", "ship"])


def test_report_is_complete(result, tmp_path):
    folder = tmp_path / "run" / "shp"
    paths = analysis.write_report(folder, *result, title="pets (generated)")
    assert set(paths) == set(folder.iterdir())
    assert [p.name for p in folder.parent.iterdir()] == ["shp"]
    assert {p.name for p in paths if p.suffix == ".png"} == {
        "heads_block_2.png", "heads_block_3.png", "labels_by_head.png", "depth.png",
    }  # fmt: skip
    record = json.loads((folder / "summary.json").read_text())
    assert record["title"] == "pets (generated)"
    assert record["images"] == 13
    assert [b["name"] for b in record["blocks"]] == ["block 2", "block 3"]
    assert [len(b["recognizes"]) for b in record["blocks"]] == [3, 5]
    assert record["choices"]["threshold"] == 0.5
    assert analysis.SHP.load(folder / "shp.npz").class_names[2] == "sea horse"
    assert analysis.Probes.load(folder / "probes.safetensors").accuracy == result[0].accuracy
    with np.load(folder / "shp.npz") as file:
        assert file["matrices.1"].shape == (5, 4, 4)
    with np.load(folder / "clusters.npz") as file:
        assert np.array_equal(file["assignment.0"], result[2][0].assignment)


def test_pictures_show_something(result, tmp_path):
    from matplotlib.image import imread

    for path in analysis.plot_shp(tmp_path, *result, title="pets"):
        pixels = imread(path)[..., :3]
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
        assert (pixels.mean(-1) < 0.95).mean() > 0.02


def test_picture_of_heads_says_what_is_in_it(result):
    _, shp, clusters, _ = result
    figure = plots.plot_heads(shp, 1, clusters[1], title="pets (generated)", heads=[4, 0])
    first, second = figure.axes[:2]
    assert first.get_title(loc="left").replace("\n", " ").startswith("head 5: ")
    assert second.get_title(loc="left").replace("\n", " ").startswith("head 1: ")
    assert figure.get_suptitle().startswith("pets (generated)\nSHP of block 3, 2 of 5 heads")
    order = clusters[1].order[4]
    names = [label.get_text() for label in first.get_yticklabels()]
    assert names == [shp.class_names[i] for i in order]
    shown = np.asarray(first.images[0].get_array())
    matrix = shp.matrices[1][4]
    np.testing.assert_allclose(shown, (matrix / matrix.max())[order][:, order])
    assert [p.get_width() for p in first.patches] == [len(c) for c in clusters[1].labels(4)]


def test_many_classes_and_heads_are_drawn(tmp_path):
    result = measured(num_classes=40, shapes=((60, 1), (2, 3)))
    paths = analysis.plot_shp(tmp_path, *result, title="forty")
    assert all(p.stat().st_size > 5000 for p in paths)
    figure = plots.plot_heads(result[1], 0, result[2][0], title="forty")
    assert "16 of 60 heads" in figure.get_suptitle()
    shown = max(plots.NAMED_CLASSES, int(result[2][0].recognized[0].sum()))
    assert figure.axes[0].images[0].get_array().shape == (shown, shown)


def test_summary_reads_well(result):
    probes, shp, clusters, snrs = result
    lines = analysis.summarize(probes, shp, clusters, snrs, max_heads=2, width=60)
    assert lines[0].startswith(f"block 2 (3 heads): accuracy {probes.accuracy[0]:.2%}, SNR ")
    assert lines[1].startswith(f"  per head {clusters[0].number.double().mean():.2f} clusters of ")
    assert lines[4] == "  ... and 1 more heads"
    assert lines[-2] == f"whole model: accuracy {probes.model_accuracy:.2%}"
    assert lines[-1].endswith("threshold 0.5, normalize matrix")
    heads = [line for line in lines if line.startswith("  head ")]
    assert len(heads) == 4
    assert all(len(line) <= 60 for line in heads)


def test_long_list_of_clusters_is_cut_between_names():
    eye = torch.eye(9)[None]
    text = analysis.summary.head_text(
        analysis.find_clusters(eye), 0, [f"class {i}" for i in range(9)], width=40
    )
    assert text == "head 1: class 0, class 1, 7\u00a0more"


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("lsmha_fast.analysis.report.folder.plot_shp", lambda *_, **__: [])


@pytest.mark.usefixtures("no_pictures")
def test_second_report_replaces_the_first(result, tmp_path):
    folder = tmp_path / "shp"
    analysis.write_report(folder, *result, title="first")
    paths = analysis.write_report(folder, *result, title="second")
    assert set(paths) == set(folder.iterdir())
    assert json.loads((folder / "summary.json").read_text())["title"] == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["shp"]


@pytest.mark.usefixtures("no_pictures")
def test_foreign_files_are_not_touched(result, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"not of an earlier report \(thesis\.txt\)"):
        analysis.write_report(tmp_path, *result, title="t")
    analysis.write_report(tmp_path / "shp", *result, title="t")
    (tmp_path / "shp" / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"note\.txt"):
        analysis.write_report(tmp_path / "shp", *result, title="t")
    assert (tmp_path / "shp" / "note.txt").read_text() == "mine"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("earlier", [False, True])
def test_interrupted_report_leaves_what_was_there(result, tmp_path, monkeypatch, earlier):
    folder = tmp_path / "shp"
    if earlier:
        analysis.write_report(folder, *result, title="first")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(analysis.Probes, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        analysis.write_report(folder, *result, title="second")
    assert [p.name for p in tmp_path.iterdir()] == (["shp"] if earlier else [])
    if earlier:
        assert json.loads((folder / "summary.json").read_text())["title"] == "first"
