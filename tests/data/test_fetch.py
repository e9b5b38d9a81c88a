"""Fetching either gives the verified archive or fails in one line and leaves nothing."""

import hashlib
import io
import os
import urllib.error
import urllib.request

import pytest

from lsmha_fast import data
from lsmha_fast.data import DatasetError, fetch
from lsmha_fast.data.cifar100_names import BINARY_ARCHIVE, BINARY_URL

CONTENT = os.urandom(700_000)


@pytest.fixture
def official(monkeypatch):
    """Make CONTENT the official archive, served by a fake urlopen."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setattr(fetch, "KNOWN_HASHES", {BINARY_ARCHIVE: ("sha256", digest)})
    monkeypatch.setattr(fetch, "BINARY_BYTES", len(CONTENT))
    serve(monkeypatch, CONTENT)


def serve(monkeypatch, content):
    def urlopen(url, timeout):
        assert url == BINARY_URL
        assert timeout > 0
        return io.BytesIO(content)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def fail(monkeypatch, error):
    def urlopen(url, timeout):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_fetch_stores_the_archive(official, tmp_path, monkeypatch):
    path = data.fetch_cifar100(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / BINARY_ARCHIVE
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == [BINARY_ARCHIVE]
    fail(monkeypatch, AssertionError("an archive that is there must not be fetched again"))
    assert data.fetch_cifar100(path.parent) == path


@pytest.mark.parametrize(
    "error, reason",
    [
        (urllib.error.URLError("Name or service not known"), "Name or service not known"),
        (urllib.error.HTTPError(BINARY_URL, 404, "Not Found", {}, None), "Not Found"),
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
    ],
)
def test_no_network_is_one_line(error, reason, tmp_path, monkeypatch):
    fail(monkeypatch, error)
    with pytest.raises(DatasetError) as caught:
        data.fetch_cifar100(tmp_path / "new")
    message = str(caught.value)
    assert "\n" not in message
    for part in (BINARY_URL, reason, str(tmp_path / "new" / BINARY_ARCHIVE)):
        assert part in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content", [b"", CONTENT[:-1], CONTENT + b"x", bytes([CONTENT[0] ^ 1]) + CONTENT[1:]]
)
def test_wrong_content_is_not_kept(content, official, tmp_path, monkeypatch):
    serve(monkeypatch, content)
    with pytest.raises(DatasetError, match="nothing was kept"):
        data.fetch_cifar100(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), KeyboardInterrupt()])
def test_broken_transfer_leaves_nothing(error, official, tmp_path, monkeypatch):
    class Breaking(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 0:
                raise error
            return super().read(size)

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Breaking(CONTENT))
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DatasetError
    with pytest.raises(expected):
        data.fetch_cifar100(tmp_path)
    assert os.listdir(tmp_path) == []


def test_wrong_archive_in_place_is_not_overwritten(official, tmp_path):
    (tmp_path / BINARY_ARCHIVE).write_bytes(b"mine")
    with pytest.raises(DatasetError, match="remove it and fetch again"):
        data.fetch_cifar100(tmp_path)
    assert (tmp_path / BINARY_ARCHIVE).read_bytes() == b"mine"


def test_folder_that_cannot_be_made(official, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DatasetError, match="cannot fetch"):
        data.fetch_cifar100(tmp_path / "file" / "below")
