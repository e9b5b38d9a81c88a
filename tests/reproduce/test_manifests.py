"""Manifests: which runs, how they are shortened, when a published number stands beside them."""

import pytest
import torch

from lsmha_fast.reproduce.manifests import PLANS, PUBLISHED, make_manifest, shorten
from lsmha_fast.reproduce.results import read_groups
from lsmha_fast.reproduce.runner import visible_gpus
from lsmha_fast.train import PRESETS, preset


@pytest.mark.parametrize("name", PLANS)
def test_plans_name_presets_and_measure_what_they_train(name):
    plan = PLANS[name]
    assert set(plan.presets) <= set(PRESETS)
    assert set(plan.shp) <= set(plan.presets)
    manifest = make_manifest(name)
    names = [run.name for run in manifest.runs]
    assert len(set(names)) == len(names) == len(plan.presets) * plan.seeds
    for run in manifest.runs:
        assert run.config == preset(run.preset, seed=run.config.seed)


def test_seeds_and_changes():
    manifest = make_manifest("early", seeds=2, changes={"data": "glyphs100", "seed": 7})
    assert [run.config.seed for run in manifest.runs] == [7, 7, 7, 8, 8, 8]
    assert all(run.config.flip == 0.0 for run in manifest.runs)  # letters have no mirror image
    assert make_manifest("early").runs[0].config.flip == 0.5


def test_shortened_recipe():
    short = shorten(preset("compact-300"), 0.02)
    assert (short.epochs, short.cooldown_epochs, short.warmup_epochs) == (6, 0, 0.2)
    assert not short.lr_per_epoch
    assert shorten(preset("compact-300"), 1.0) == preset("compact-300")
    assert shorten(preset("compact-300"), 1e-6).epochs == 1


def write_rows(folder, epochs):
    folder.mkdir(parents=True)
    row = '{{"epoch": {}, "test_accuracy": 0.5, "seconds": 6, "train_images_per_s": 10}}\n'
    (folder / "metrics.jsonl").write_text("".join(row.format(e + 1) for e in range(epochs)))


@pytest.mark.parametrize(
    "options, shown",
    [
        ({}, True),
        ({"changes": {"data_root": "x", "device": "cuda"}}, True),
        ({"changes": {"lr": 1e-3}}, False),
        ({"changes": {"data": "glyphs100"}}, False),
        ({"scale": 0.5}, False),
    ],
)
def test_published_numbers_stand_beside_the_whole_recipe_alone(tmp_path, options, shown):
    manifest = make_manifest("baselines", **options)
    for run in manifest.runs:
        write_rows(tmp_path / "runs" / run.name, run.config.total_epochs)
    groups = read_groups(manifest, tmp_path)
    assert [group.published for group in groups] == [
        PUBLISHED[group.preset] if shown else None for group in groups
    ]


@pytest.mark.parametrize(
    "options, words",
    [({"scale": 0.0}, "--scale"), ({"scale": 1.1}, "--scale"), ({"changes": {"lr": -1}}, "--lr")],
)
def test_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_manifest("early", **options)
    with pytest.raises(ValueError, match="must be one of baselines"):
        make_manifest("all")


@pytest.mark.parametrize(
    ("named", "count", "gpus"),
    [(None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("GPU-a,GPU-b", 1, ["GPU-a"]), (None, 0, [])],
)
def test_runs_take_the_gpus_that_were_given(monkeypatch, named, count, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == gpus
