"""SHP in shards: the same bits for any number of processes, no image twice, resumed by shard."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import TinyModel, random_batches, random_probes

from lsmha_fast.analysis import measure_shards, merge_shards, single_head_performance

SIZES = (7, 5, 9, 4, 6, 8, 3, 5, 7, 6, 5)  # 11 batches: shards of 4, 4 and 3


def assert_same_bits(a, b):
    assert torch.equal(a.counts, b.counts)
    for name in ("sums", "fc_weight", "fc_bias"):
        assert all(map(torch.equal, getattr(a, name), getattr(b, name)))
    for name in ("block_names", "class_names", "pooling", "bias", "layer_norm"):
        assert getattr(a, name) == getattr(b, name)


@pytest.fixture
def many():
    return random_batches(SIZES)


@pytest.fixture
def probes(model):
    return random_probes(model)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_same_bits_for_any_number_of_processes(model, probes, many, tmp_path, world_size):
    options = {"pooling": "full", "bias": True, "class_names": list("abcd")}
    whole = single_head_performance(model, probes, many, **options)
    for rank in reversed(range(world_size)):
        measure_shards(model, probes, many, tmp_path, rank=rank, world_size=world_size, **options)
    assert len(list(tmp_path.iterdir())) == 3
    assert_same_bits(merge_shards(tmp_path, probes), whole)


def test_no_image_twice(model, probes, many, tmp_path):
    seen = []
    forward = model.forward_with_heads
    model.forward_with_heads = lambda x: (seen.append(x), forward(x))[1]
    for rank in range(2):
        measure_shards(model, probes, many, tmp_path, rank=rank, world_size=2)
    key = lambda x: x.flatten().tolist()  # noqa: E731
    assert sorted(map(key, seen)) == sorted(key(x) for x, _ in many)
    assert merge_shards(tmp_path, probes).counts.sum() == sum(SIZES)


def test_resumed_by_shard(model, probes, many, tmp_path):
    paths = measure_shards(model, probes, many, tmp_path)
    whole = merge_shards(tmp_path, probes)
    paths[1].unlink()
    with pytest.raises(ValueError, match="misses 1 of 3 shards: shard-00001-of-00003.npz"):
        merge_shards(tmp_path, probes)
    model.calls = 0
    measure_shards(model, probes, many, tmp_path)
    assert model.calls == 4
    assert_same_bits(merge_shards(tmp_path, probes), whole)
    model.calls = 0
    measure_shards(model, probes, many, tmp_path)
    assert model.calls == 0


def test_shards_of_other_measurements_are_refused(model, probes, many, tmp_path):
    measure_shards(model, probes, many, tmp_path)
    with pytest.raises(ValueError, match="another measurement: its pooling differ"):
        measure_shards(model, probes, many, tmp_path, pooling="full")
    with pytest.raises(ValueError, match="its batches, shards differ"):
        measure_shards(model, probes, many[:5], tmp_path)
    other = copy.deepcopy(model)
    other.fc.bias.data += 1
    with pytest.raises(ValueError, match="its model differ"):
        measure_shards(other, probes, many, tmp_path)
    with pytest.raises(ValueError, match="other probes"):
        merge_shards(tmp_path, replace(probes, layer_norm=True))


def test_damaged_or_renamed_shards_are_refused(model, probes, many, tmp_path):
    paths = measure_shards(model, probes, many, tmp_path)
    content = paths[0].read_bytes()
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(ValueError, match="holds shard 1, expected 0"):
        merge_shards(tmp_path, probes)
    paths[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="shard-00000-of-00003.npz: not a readable"):
        merge_shards(tmp_path, probes)
    with pytest.raises(FileNotFoundError, match="no shards"):
        merge_shards(tmp_path / "empty", probes)


class Lying(list):
    def __len__(self):
        return super().__len__() + self.more


@pytest.mark.parametrize("more", [-1, 1, 5])
def test_wrong_length_is_an_error(model, probes, many, tmp_path, more):
    batches = Lying(many)
    batches.more = more
    with pytest.raises(ValueError, match="batches say they are"):
        measure_shards(model, probes, batches, tmp_path)


def test_bad_input_is_an_error(model, probes, many, tmp_path):
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, got 2"):
        measure_shards(model, probes, many, tmp_path, rank=2, world_size=2)
    with pytest.raises(ValueError, match="one-way iterator"):
        measure_shards(model, probes, iter(many), tmp_path)
    broken = [(x * torch.nan, y) for x, y in many]
    with pytest.raises(ValueError, match="not finite"):
        measure_shards(model, probes, broken, tmp_path)
    assert list(tmp_path.iterdir()) == []


WORKER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tiny_model import TinyModel, random_batches, random_probes
from lsmha_fast.analysis import measure_shards, merge_shards
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
model = TinyModel()
probes, batches = random_probes(model), random_batches(%r)
measure_shards(model, probes, batches, sys.argv[2])
shp = merge_shards(sys.argv[2], probes)
if torch.distributed.get_rank() == 0:
    shp.save(sys.argv[2] + ".npz")
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_torchrun_gives_the_bits_of_one_process(tmp_path, ranks):
    from lsmha_fast.analysis import SHP

    torch.manual_seed(0)
    model = TinyModel()
    probes, batches = random_probes(model), random_batches(SIZES)
    whole = single_head_performance(model, probes, batches)
    script = tmp_path / "worker.py"
    script.write_text(WORKER % (SIZES,))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    where = [str(script), str(Path(__file__).parent), str(tmp_path / "shards")]
    done = subprocess.run(
        [*command, str(ranks), *where], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert_same_bits(SHP.load(tmp_path / "shards.npz"), whole)
