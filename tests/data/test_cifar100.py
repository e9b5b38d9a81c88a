"""Every layout of CIFAR-100 gives the same tensors; what differs from the official set shows."""

import os
import random
import re

import numpy as np
import pytest
import torch
from cifar100_trees import (
    WRITERS,
    binary_files,
    content,
    png,
    python_files,
    write_files,
    write_folder,
    write_parquet,
    write_python,
)

from lsmha_fast import data
from lsmha_fast.data import DatasetError, cache, cifar100, cifar100_readers
from lsmha_fast.data import cifar100_names as official

pytestmark = pytest.mark.filterwarnings("ignore:cifar100. unverified")


@pytest.fixture(scope="module", params=WRITERS)
def tree(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar100")
    WRITERS[request.param](root)
    return request.param, root


def load(root, split="train", **options):
    return data.load_dataset("cifar100", split, root, **options)


@pytest.mark.parametrize("split", ["train", "test"])
def test_layouts_agree(tree, split):
    kind, root = tree
    expected = content(split)
    assert cifar100.find_layout(root).kind == kind
    for _ in range(2):  # the second time, images come from the cache
        dataset = load(root, split, allow_unverified=True)
        assert torch.equal(dataset.images, torch.from_numpy(expected.images))
        assert torch.equal(dataset.labels, torch.from_numpy(expected.fine))
        assert torch.equal(dataset.coarse_labels, torch.from_numpy(expected.coarse))
    assert dataset.class_names[:2] == ("apple", "aquarium_fish")
    assert dataset.coarse_names[dataset.coarse_labels[0]] == "fruit_and_vegetables"
    assert (dataset.mean, dataset.std, dataset.generated) == (official.MEAN, official.STD, False)


def test_unofficial_data_are_refused_by_default(tree):
    _, root = tree
    with pytest.raises(
        DatasetError, match=r"has (sha256|md5) \w+, expected|images, 2 to 2 per class"
    ):
        load(root)
    with pytest.raises(DatasetError):
        data.verify("cifar100", root)


def test_verify_says_what_was_accepted(tree):
    kind, root = tree
    lines = data.verify("cifar100", root, allow_unverified=True)
    assert lines[0].startswith(f"layout: {kind} in ")
    assert any(line.startswith("unverified: train has 200 images") for line in lines)
    assert "test: 200 images, labels in range, groups consistent" in lines


def test_unverified_data_warn(tmp_path):
    write_python(tmp_path)
    with pytest.warns(UserWarning, match="unverified: .*train has md5"):
        load(tmp_path, allow_unverified=True)


def test_official_counts_pass_without_a_warning(tmp_path, recwarn):
    write_files(tmp_path, binary_files(per_class=500))
    (tmp_path / "test.bin").write_bytes(binary_files(per_class=100)["test.bin"])
    assert len(load(tmp_path)) == 50_000
    assert len(load(tmp_path, "test")) == 10_000
    assert not [w for w in recwarn if "cifar100" in str(w.message)]
    assert "train: 50000 images, labels in range, groups consistent" in data.verify(
        "cifar100", tmp_path
    )


def test_known_hash_is_compared(tmp_path, monkeypatch):
    write_python(tmp_path)
    folder = tmp_path / "cifar-100-python"
    hashes = {name: ("md5", cifar100.hash_file(folder / name, "md5")) for name in python_files()}
    monkeypatch.setattr(official, "KNOWN_HASHES", hashes)
    layout = cifar100.find_layout(tmp_path)
    assert cifar100.check_hashes(layout, False) == [f"{n}: md5 matches" for n in layout.hashed]
    for name in layout.hashed:
        original = (folder / name).read_bytes()
        for position in random.Random(0).sample(range(len(original)), 20):
            flipped = bytearray(original)
            flipped[position] ^= 1 << position % 8
            (folder / name).write_bytes(flipped)
            with pytest.raises(DatasetError, match=f"{name} has md5"):
                cifar100.check_hashes(layout, False)
        (folder / name).write_bytes(original)


def test_hierarchy_is_twenty_groups_of_five():
    assert len(official.FINE_NAMES) == len(set(official.FINE_NAMES)) == 100
    assert np.bincount(official.COARSE_OF_FINE).tolist() == [5] * 20
    assert list(official.COARSE_NAMES) == sorted(official.COARSE_NAMES)
    assert official.FINE_NAMES[52] == "oak_tree"
    assert official.COARSE_NAMES[official.COARSE_OF_FINE[52]] == "trees"


@pytest.mark.parametrize("cut", [1, 2, 3073])
def test_truncated_records_are_refused(tmp_path, cut):
    files = binary_files()
    files["train.bin"] = files["train.bin"][:-cut]
    write_files(tmp_path, files)
    with pytest.raises(DatasetError, match="whole number of 3074-byte records"):
        load(tmp_path, allow_unverified=True)


@pytest.mark.parametrize("byte, value, message", [(1, 100, "0..99, got 0..100"), (0, 7, "group 7")])
def test_wrong_labels_are_refused(tmp_path, byte, value, message):
    files = binary_files()
    damaged = bytearray(files["train.bin"])
    damaged[byte] = value
    write_files(tmp_path, {**files, "train.bin": bytes(damaged)})
    with pytest.raises(DatasetError, match=message):
        load(tmp_path, allow_unverified=True)


def test_wrong_names_are_refused(tmp_path):
    names = binary_files()["fine_label_names.txt"].replace(b"apple", b"grape")
    write_files(tmp_path, {**binary_files(), "fine_label_names.txt": names})
    with pytest.raises(DatasetError, match="class names are not CIFAR-100's"):
        load(tmp_path, allow_unverified=True)


def test_unknown_class_folder_is_refused(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "apple").rename(tmp_path / "train" / "aple")
    with pytest.raises(DatasetError, match="'aple' is not one of"):
        load(tmp_path, allow_unverified=True)


def test_missing_folder_and_empty_folder(tmp_path):
    with pytest.raises(DatasetError, match="no folder .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"looked for cifar-100-binary\.tar\.gz"):
        load(tmp_path)
    with pytest.raises(DatasetError, match="--data-root DIR"):
        load(None)


@pytest.mark.parametrize(
    "image", [np.zeros((3, 32, 33), np.uint8), np.zeros((3, 4000, 4000), np.uint8)]
)
def test_png_of_another_size_is_refused(image):
    with pytest.raises(DatasetError, match="expected 32x32 RGB"):
        cifar100_readers.decode_png(png(image), "x.png")


def test_damaged_png_is_refused():
    good = png(content("train").images[0])
    refused = 0
    for position in range(0, len(good), 7):
        damaged = _flip(good, position)
        refused += refusal(lambda d=damaged: cifar100_readers.decode_png(d, "x.png")) is not None
    # flips inside what carries no pixels (a checksum Pillow skips) may pass
    assert refused > 0.9 * len(range(0, len(good), 7))
    for value in (b"", b"GIF89a", good[:-200], None, bytes(1 << 17)):
        assert refusal(lambda v=value: cifar100_readers.decode_png(v, "x.png"))


def test_damaged_parquet_is_a_dataset_error(tmp_path):
    write_parquet(tmp_path)
    path = next(tmp_path.glob("train-*.parquet"))
    good = path.read_bytes()
    for damaged in (good[:1000], good[:-4], b"", good[: len(good) // 2] + bytes(100)):
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match="broken parquet"):
            load(tmp_path, allow_unverified=True)


def test_parquet_with_other_columns_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    write_parquet(tmp_path)
    table = pa.table({"text": ["a"], "label": [0]})
    pyarrow.parquet.write_table(table, next(tmp_path.glob("train-*.parquet")))
    with pytest.raises(DatasetError, match="expected columns img, fine_label"):
        load(tmp_path, allow_unverified=True)


def test_cache_follows_its_source(tmp_path):
    write_folder(tmp_path)
    load(tmp_path, allow_unverified=True)
    cached = tmp_path / cache.FOLDER / "cifar100-folder-train.npz"
    assert cached.is_file()
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]
    changed = tmp_path / "train" / "apple" / "00000.png"
    changed.write_bytes(png(np.zeros((3, 32, 32), np.uint8)))
    os.utime(changed, ns=(1, 1))
    assert load(tmp_path, allow_unverified=True).images[0].max() == 0


def test_damaged_cache_is_rebuilt(tmp_path):
    write_folder(tmp_path)
    first = load(tmp_path, allow_unverified=True).images
    cached = tmp_path / cache.FOLDER / "cifar100-folder-train.npz"
    good = cached.read_bytes()
    positions = random.Random(1).sample(range(len(good)), 10)
    for damaged in [good[:-50], b"", *(_flip(good, position) for position in positions)]:
        cached.write_bytes(damaged)
        assert torch.equal(load(tmp_path, allow_unverified=True).images, first)


def test_unwritable_folder_is_no_error(tmp_path, monkeypatch):
    write_folder(tmp_path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "atomic_file", refuse)
    assert len(load(tmp_path, allow_unverified=True)) == 200


@pytest.mark.parametrize("kind", ["binary", "binary archive", "python", "python archive"])
def test_only_dataset_error_escapes_from_damaged_files(kind, tmp_path):
    WRITERS[kind](tmp_path)
    layout = cifar100.find_layout(tmp_path)
    path = layout.folder / (layout.hashed[0] if layout.hashed else "train.bin")
    good = path.read_bytes()
    rng = random.Random(2)
    refused = 0
    for _ in range(25):
        path.write_bytes(_flip(good, rng.randrange(len(good)))[: rng.randrange(len(good))])
        refused += refusal(lambda: load(tmp_path, allow_unverified=True)) is not None
    # an archive cut behind the members of this split still reads
    assert refused >= (5 if "archive" in kind else 25)


def refusal(call) -> str | None:
    """The one line of the DatasetError that `call` raises, or None."""
    try:
        call()
    except DatasetError as error:
        message = str(error)
    else:
        return None
    assert re.fullmatch(r"[^\n]+", message)
    return message


def _flip(data: bytes, position: int) -> bytes:
    damaged = bytearray(data)
    damaged[position] ^= 0x10
    return bytes(damaged)
