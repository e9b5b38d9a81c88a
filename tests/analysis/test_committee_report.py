"""The committee's folder is whole, its picture shows the curves, its lines say what is compared."""

import json

import numpy as np
import pytest
import torch
from test_committee import planted

from lsmha_fast.analysis import committee_lines, soft_committee, write_committee
from lsmha_fast.analysis.committee_report import plot_committee


@pytest.fixture(scope="module")
def committee():
    torch.manual_seed(0)
    members, batches, _ = planted(4)
    names = ["one", "two", "three", "four"]
    return soft_committee(members, batches, names=names, groups=["a", "a", "b", "b"], samples=100)


def test_folder_is_complete_and_replaced(committee, tmp_path):
    folder = tmp_path / "committee"
    origin = {"command": "lsmha committee a b"}
    paths = write_committee(folder, committee, title="shapes (generated)", origin=origin)
    assert set(paths) == set(folder.iterdir())
    record = json.loads((folder / "summary.json").read_text())
    assert record["names"] == ["one", "two", "three", "four"]
    assert record["images"] == 300
    assert record["origin"] == origin
    whole = record["sizes"]["logit"][-1]
    assert (whole["size"], whole["mean"]) == (4, committee.sizes["logit"][-1].mean)
    assert record["comparisons"]["probability"][2]["what"] == "2 architectures - 2 seeds of one"
    write_committee(folder, committee, title="again")
    assert (folder / "summary.txt").read_text().startswith("again\n")
    (folder / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"note\.txt"):
        write_committee(folder, committee, title="third")


def test_picture_shows_the_accuracies(committee):
    figure = plot_committee(committee, title="shapes (generated)")
    assert "shapes (generated)" in figure.get_suptitle()
    for ax, entries in zip(figure.axes, committee.sizes.values(), strict=True):
        curves = {line.get_label(): line for line in ax.lines}
        assert set(curves) == {
            "all subsets", "different architectures", "seeds of one architecture",
        }  # fmt: skip
        means = [100 * e.mean for e in entries if e.kind == "all"]
        np.testing.assert_allclose(curves["all subsets"].get_ydata(), means)
        assert curves["all subsets"].get_xdata().tolist() == [1, 2, 3, 4]


def test_lines(committee):
    lines = list(committee_lines(committee))
    assert lines[0] == "accuracy of the members on 300 images"
    assert lines[1] == f"  one (a): {committee.members[0]:.2%}"
    assert sum("2 architectures - 2 seeds of one: " in line for line in lines) == 2
    assert not any("no equal-seed control" in line for line in lines)
    members, batches, _ = planted(2)
    alone = list(committee_lines(soft_committee(members, batches, samples=20)))
    assert any("no equal-seed control" in line for line in alone)
