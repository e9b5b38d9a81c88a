"""Files that are whole or absent."""

import pytest
import torch

from lsmha_fast.train.checkpoint import (
    load_checkpoint,
    load_state,
    load_weights,
    save_state,
    save_weights,
)


def test_weights_round_trip(tmp_path):
    weights = {"a": torch.randn(3, 4).T, "b": torch.zeros(0)}
    save_weights(tmp_path / "w.safetensors", weights)
    loaded = load_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(loaded[k], weights[k]) for k in weights)


def test_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, {"epoch": 1})
    with pytest.raises(Exception, match="pickle"):
        save_state(path, {"epoch": lambda: 2})
    assert load_state(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_damaged_files_are_value_errors(tmp_path, keep):
    for path, save, load in (
        (tmp_path / "w.safetensors", save_weights, load_weights),
        (tmp_path / "state.pt", save_state, load_state),
    ):
        save(path, {"a": torch.randn(100)})
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        with pytest.raises(ValueError, match=path.name):
            load(path)


def test_state_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"epoch": Evil()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_state(tmp_path / "state.pt")


def test_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_weights(tmp_path / "none.safetensors")


def test_the_state_of_an_older_version_is_not_mistaken_for_none(tmp_path):
    assert load_checkpoint(tmp_path) is None
    (tmp_path / "state.pt").touch()
    with pytest.raises(ValueError, match=r"state.pt is of an older version"):
        load_checkpoint(tmp_path)
