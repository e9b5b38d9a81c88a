"""Crafted pickles and archives are refused and leave no trace."""

import gzip
import os
import pickle
import tarfile

import numpy as np
import pytest
from cifar100_trees import binary_files, python_files, write_files, write_tar

from lsmha_fast import data
from lsmha_fast.data import DatasetError, archives
from lsmha_fast.data.cifar100_names import BINARY_ARCHIVE
from lsmha_fast.data.pickles import safe_load, to_uint8

pytestmark = pytest.mark.filterwarnings("ignore:cifar100. unverified")


class Reduce:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


class State:
    """A pickle of this builds an instance of a foreign class and sets its state."""

    def __reduce__(self):
        return object, (), {"key": Reduce(os.system, "true")}


def marker_payloads(marker):
    command = f"touch {marker}"
    return {
        "reduce": pickle.dumps(Reduce(os.system, command), 2),
        "nested in a list": pickle.dumps({"data": [[Reduce(os.system, command)]]}, 2),
        "eval": pickle.dumps(Reduce(eval, f"open({str(marker)!r}, 'w')"), 2),
        "getattr chain": pickle.dumps(Reduce(getattr, "text", "upper"), 2),
        "build": pickle.dumps(State(), 2),
        "protocol 0": pickle.dumps(Reduce(os.system, command), 0),
        "stack global": pickle.dumps(Reduce(os.system, command), 4),
        "inst": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "through an admitted module": b"cnumpy\nload\n(S'x'\ntR.",
        "persistent id": b"Pfile\n.",
        "extension registry": b"\x82\x01.",
    }


@pytest.mark.parametrize("kind", marker_payloads("x"))
def test_crafted_pickle_is_refused(kind, tmp_path):
    marker = tmp_path / "ran"
    payload = marker_payloads(marker)[kind]
    with pytest.raises(DatasetError) as caught:
        safe_load(payload)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["train", "meta"])
def test_crafted_pickle_in_a_data_folder_is_refused(name, tmp_path):
    marker = tmp_path / "ran"
    crafted = pickle.dumps({"data": Reduce(os.system, f"touch {marker}")}, 2)
    write_files(tmp_path / "cifar-100-python", {**python_files(), name: crafted})
    with pytest.raises(DatasetError, match=r"asks for (posix|os)\.system"):
        data.load_dataset("cifar100", "train", tmp_path, allow_unverified=True)
    with pytest.raises(DatasetError, match="has md5"):
        data.load_dataset("cifar100", "train", tmp_path)
    assert not marker.exists()


def test_state_set_on_a_stand_in_does_not_outlive_the_load():
    # BUILD on the stand-in of numpy.dtype itself, with a slot state that sets an attribute
    crafted = b"cnumpy\ndtype\n(N}S'code'\nS'O'\nstb."
    with pytest.raises(DatasetError):
        safe_load(crafted)
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert np.array_equal(to_uint8(safe_load(pickle.dumps(array, 2))), array)


@pytest.mark.parametrize(
    "crafted",
    [
        b"\x80\x02]r\xff\xff\xff\x7f.",  # LONG_BINPUT far beyond the file: gigabytes of memo
        b"\x80\x02]p999999999999\n.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",  # BINBYTES8 longer than the file
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x02]q\x00h\x05.",  # a memo slot never written
        b"\x80\x02",
        b"",
        b"\x80\x09.",
    ],
)
def test_broken_pickle_is_refused(crafted):
    with pytest.raises(DatasetError, match="broken pickle"):
        safe_load(crafted)


def test_memo_references_stay_references():
    # ten levels of ten references each: small in memory as long as nobody copies it
    nested = []
    for _ in range(10):
        nested = [nested] * 10
    assert len(safe_load(pickle.dumps(nested, 2))) == 10


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(4, np.float32),
        np.array([{}], dtype=object),
        np.asfortranarray(np.zeros((2, 3), np.uint8)),
        np.zeros(3, dtype=[("a", "u1")]),
    ],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(DatasetError):
        to_uint8(safe_load(pickle.dumps(array, 2)))


def test_array_shape_must_fit_its_bytes():
    crafted = pickle.dumps(np.zeros((2, 3), np.uint8), 2).replace(b"K\x02K\x03", b"K\x7fK\x7f")
    with pytest.raises(DatasetError, match="not a uint8 array"):
        to_uint8(safe_load(crafted))


def test_text_in_place_of_labels_is_refused(tmp_path):
    files = python_files()
    content = pickle.loads(files["train"])
    content["fine_labels"] = ["0"] * 200
    write_files(tmp_path, {**files, "train": pickle.dumps(content, 2)})
    with pytest.raises(DatasetError, match="expected 200 integer labels"):
        data.load_dataset("cifar100", "train", tmp_path, allow_unverified=True)


def link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def archive_files():
    return {f"cifar-100-binary/{name}": content for name, content in binary_files().items()}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_place_of_members_are_refused(tmp_path, kind):
    member = link("cifar-100-binary/train.bin", "/etc/passwd", kind)
    write_tar(tmp_path / BINARY_ARCHIVE, archive_files(), (member,))
    with pytest.raises(DatasetError, match="not a regular file"):
        data.load_dataset("cifar100", "train", tmp_path, allow_unverified=True)


def test_members_that_climb_out_are_never_written(tmp_path):
    root = tmp_path / "inner"
    evil = {"../outside": b"x", "/tmp/lsmha-fast-outside": b"x", "cifar-100-binary/../../up": b"x"}
    write_tar(root / BINARY_ARCHIVE, {**evil, **archive_files()}, (link("down", ".."),))
    dataset = data.load_dataset("cifar100", "train", root, allow_unverified=True)
    assert len(dataset) == 200
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", BINARY_ARCHIVE]
    assert not os.path.exists("/tmp/lsmha-fast-outside")


def test_member_larger_than_its_kind_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="has 11 bytes, at most 10 are allowed"):
        archives.read_members(write_tar(tmp_path / "a.tar.gz", {"a": b"x" * 11}), {"a": 10})


def test_gzip_bomb_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_UNPACKED", 1 << 20)
    path = write_tar(tmp_path / "a.tar.gz", {"padding": bytes(50 << 20), "a": b"x"})
    assert path.stat().st_size < 100_000
    with pytest.raises(DatasetError, match="holds more than 1048576 bytes"):
        archives.read_members(path, {"a": 10})


def test_missing_member_and_broken_archive(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", {"b": b"x"})
    with pytest.raises(DatasetError, match="has no a"):
        archives.read_members(path, {"a": 10})
    for damaged in (b"", b"no archive", gzip.compress(b"no tar"), path.read_bytes()[:60]):
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match="broken archive|has no b"):
            archives.read_members(path, {"b": 10})
