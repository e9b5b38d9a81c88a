"""Recorded steps: the bits of plain ones, and nothing in them that a replay would not see."""

from dataclasses import replace

import pytest
import recorded
import torch
from tiny import TINY, load

from lsmha_fast.cli import main
from lsmha_fast.train import RunOptions, load_run, train
from lsmha_fast.train import graph as graph_module
from lsmha_fast.train import run as run_module
from lsmha_fast.train import trainer as trainer_module
from lsmha_fast.train.graph import WARM_UP, Graphed
from lsmha_fast.train.run import read_metrics

# 48 images: four whole batches and one of 8; everything random is on
CONFIG = replace(TINY, batch_size=10, attn_drop=0.1, drop_path=0.2, mixup=0.8, erase=0.25)
GRAPHED = RunOptions(cuda_graph=True)


@pytest.fixture
def recordings(monkeypatch):
    """Records on the CPU; a list of how often each recording was replayed."""
    counts = []

    def record(function):
        made, number = recorded.record(function), len(counts)
        counts.append(0)

        def replay():
            counts[number] += 1
            made.replay()

        return made._replace(replay=replay)

    monkeypatch.setattr(run_module, "load_dataset", load)
    monkeypatch.setattr(graph_module, "record_cuda_graph", record)
    monkeypatch.setattr(trainer_module, "check_graph", lambda *_: None)
    return counts


def assert_same_runs(one, other):
    for which in ("best", "last"):
        a, b = (load_run(folder, which).model.state_dict() for folder in (one, other))
        assert all(torch.equal(a[key], b[key]) for key in a)
    for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
        speeds = {"seconds", "train_images_per_s"}
        assert {k: a[k] for k in a.keys() - speeds} == {k: b[k] for k in b.keys() - speeds}


@pytest.mark.parametrize("conv_blocks", [0, 1])
def test_a_recorded_run_gives_the_bits_of_a_plain_one(tmp_path, recordings, conv_blocks):
    config = replace(CONFIG, conv_blocks=conv_blocks, num_heads=16)
    train(config, tmp_path / "plain")
    assert recordings == []
    train(config, tmp_path / "graphed", options=GRAPHED)
    steps = config.epochs * 4  # of whole batches; the evaluation has as many
    assert sorted(recordings) == [steps - WARM_UP, steps - WARM_UP]
    assert_same_runs(tmp_path / "plain", tmp_path / "graphed")


def test_a_recorded_run_goes_on_to_the_bit(tmp_path, recordings, monkeypatch):
    train(CONFIG, tmp_path / "plain")
    steps, step = iter(range(100)), trainer_module.Trainer.train_step

    def interrupted(self, *args):
        if next(steps) == 8:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(CONFIG, tmp_path / "cut", options=GRAPHED)
    train(CONFIG, tmp_path / "cut", resume=True, options=GRAPHED)
    assert_same_runs(tmp_path / "plain", tmp_path / "cut")


def test_a_bad_loss_in_a_replay_stops_at_its_step(tmp_path, recordings, monkeypatch):
    step = trainer_module.Trainer.train_step

    def poisoned(self, images, targets):
        bad = self.epoch == 1 and self.step == 2
        return step(self, images * float("nan") if bad else images, targets)

    monkeypatch.setattr(trainer_module.Trainer, "train_step", poisoned)
    with pytest.raises(ValueError, match="epoch 2, step 3"):
        train(CONFIG, tmp_path / "run", options=GRAPHED)
    state = torch.load(tmp_path / "run/diverged.pt", weights_only=True)
    assert all(p.isfinite().all() for p in state["model"].values())


def test_a_function_of_several_shapes(recordings):
    function = Graphed(lambda x, y: x * 2 + y)
    for i in range(8):
        x, y = torch.full((3,), float(i)), torch.ones(3)
        assert torch.equal(function(x, y), x * 2 + y)
        small = torch.full((2,), float(i))
        assert torch.equal(function(small, small), small * 3)
        assert torch.equal(function(x.long(), y.long()), x.long() * 2 + 1)
    assert recordings == [8 - WARM_UP]


@pytest.mark.parametrize("wait", [lambda x: x.item(), lambda x: bool(x > 0), torch.nonzero])
def test_the_recorder_refuses_what_waits(wait):
    with pytest.raises(RuntimeError, match="waits for the device"):
        recorded.record(lambda: wait(torch.ones(())))


def test_numbers_that_are_no_tensors_are_kept_by_a_recording():
    numbers = iter((1.0, 2.0))
    total = torch.zeros(())
    made = recorded.record(lambda: total.add_(next(numbers)))
    assert total == 0
    made.replay()
    made.replay()
    assert total == 2.0  # not 3


def test_the_command_says_where_no_graph_can_be(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", load)
    assert main(["train", "--cuda-graph", "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    assert "--cuda-graph records one GPU's steps, which --device cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_run_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", load)
    config = replace(CONFIG, device="cuda", pipeline="device")
    train(config, tmp_path / "plain")
    train(config, tmp_path / "graphed", options=GRAPHED)
    assert_same_runs(tmp_path / "plain", tmp_path / "graphed")
