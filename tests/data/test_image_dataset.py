"""A data set is checked when it is made; names and options are obeyed or refused in one line."""

import importlib
import subprocess
import sys

import pytest
import torch

from lsmha_fast import data
from lsmha_fast.data import DatasetError, ImageDataset
from lsmha_fast.data.dataset import channel_stats


def make(**changes):
    fields = {
        "name": "toy",
        "images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 1, 0]),
        "class_names": ("a", "b"),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
    }
    return ImageDataset(**{**fields, **changes})


def test_good_fields_pass():
    dataset = make()
    assert (len(dataset), dataset.num_classes) == (4, 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": torch.zeros(4, 3, 8, 8)}, r"uint8 \(M, 3, H, W\), got torch.float32"),
        ({"images": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}, r"\(4, 1, 8, 8\)"),
        ({"labels": torch.tensor([0, 1, 2, 0])}, r"must lie in 0\.\.1, got 0\.\.2"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, r"got -1\.\.1"),
        ({"labels": torch.tensor([0, 1])}, r"int64 \(4,\), got torch.int64 \(2,\)"),
        ({"labels": torch.zeros(4)}, "got torch.float32"),
        ({"class_names": ("a", "a")}, "not unique"),
        ({"std": (0.2, 0.0, 0.2)}, "std above zero"),
        (
            {"coarse_labels": torch.zeros(4, dtype=torch.int64)},
            r"coarse_labels must lie in 0\.\.-1",
        ),
    ],
)
def test_bad_fields_are_refused(changes, message):
    with pytest.raises(DatasetError, match=message):
        make(**changes)


def test_channel_stats():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[0, 1], images[:, 2] = 255, 51
    assert channel_stats(images) == ((0.0, 0.5, 0.2), (0.0, 0.5, 0.0))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: data.load_dataset("cifar10", "train"), "'cifar10'; allowed: digits, glyphs100"),
        (lambda: data.load_dataset("digits", "val"), "'val'; allowed: train, test"),
        (lambda: data.load_dataset("glyphs100", "val"), "'val'; allowed: train, test"),
        (lambda: data.load_dataset("cifar100", "val", "x"), "'val'; allowed: train, test"),
        (lambda: data.load_dataset("digits", "train", tier="easy"), "'tier'; allowed: size"),
        (
            lambda: data.load_dataset("digits", "train", size=30),
            "multiple of 8 from 8 to 256, got 30",
        ),
        (lambda: data.load_dataset("digits", "train", "folder"), "was given: folder"),
        (lambda: data.load_dataset("glyphs100", "train", tier="x"), "'x'; allowed: easy, medium"),
        (lambda: data.load_dataset("glyphs100", "train", size=0), "size must be >= 1, got 0"),
        (lambda: data.verify("glyphs100", tier="x"), "'x'; allowed: easy, medium"),
        (lambda: data.verify("imagenet"), "allowed: digits, glyphs100, cifar100"),
        (lambda: data.default_augment("imagenet"), "allowed: digits, glyphs100, cifar100"),
    ],
)
def test_bad_calls_say_what_is_allowed(call, message):
    with pytest.raises(DatasetError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "package, call",
    [
        ("sklearn", lambda: data.load_dataset("digits", "train")),
        ("matplotlib", lambda: data.contact_sheet(make(), "x.png")),
    ],
)
def test_missing_package_names_the_extra(package, call, monkeypatch):
    real = importlib.import_module

    def without(name, *args):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(DatasetError, match=rf'package {package}: pip install "lsmha_fast\[data\]"'):
        call()


def test_import_needs_torch_and_numpy_only():
    optional = ["sklearn", "matplotlib", "PIL", "pyarrow", "fontTools", "urllib.request", "tqdm"]
    code = (
        "import torch, sys; before = set(sys.modules); import lsmha_fast.data; "
        f"print([m for m in {optional} if m in set(sys.modules) - before])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_describe_and_verify_read_well():
    lines = data.describe("digits", "test")
    assert lines[0] == "digits, test: 359 images 32x32, 10 classes, 35 to 37 per class"
    assert data.verify("digits") == ["digits: 1797 images from scikit-learn, sha256 matches"]
    lines = data.describe("glyphs100", "test", size=200)
    assert lines[0].startswith("glyphs100-easy (generated), test: 200 images 32x32, 100 classes")
    assert lines[-1] == "groups: digit, Latin upper, Latin lower, Greek, Cyrillic, symbol"
