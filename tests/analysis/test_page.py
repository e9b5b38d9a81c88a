"""The page of a run: right numbers, escaped, self-contained, and the same for the same results."""

import base64
import datetime
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from test_report import measured as measure
from tiny_model import TinyModel, random_batches, random_probes

from lsmha_fast import analysis
from lsmha_fast.analysis.null import null_means
from lsmha_fast.analysis.page import check_page, read_measured, render, write_page
from lsmha_fast.analysis.page.charts import Series, digits, line_chart, nice_ticks, number_text
from lsmha_fast.analysis.page.data import page_data

EVIL = "<script>alert(1)</script>"
NAMES = ["cat & dog", EVIL, "quote \" and '", "a name that is far too long for any table column"]
DAY = datetime.date(2026, 1, 2)
VOID = {"meta", "link", "input", "img", "br"}
SELF_CLOSED = {"path", "line"}


class Page(HTMLParser):
    """Elements with their attributes and text; checks that tags are nested and closed."""

    def __init__(self, html):
        super().__init__()
        self.stack, self.elements = [], []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", "parents": [e["tag"] for e in self.stack], **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.stack:
            element["text"] += data

    def all(self, tag):
        return [e for e in self.elements if e["tag"] == tag]


def tables(html):
    """Caption -> (columns, rows of cell texts), as a reader without script has them."""
    found = {}
    for text in re.findall(r"<table>.*?</table>", html, re.S):
        page = Page(text)
        columns = [e["text"] for e in page.all("th") if "thead" in e["parents"]]
        cells = [e["text"] for e in page.elements
                 if e["tag"] in ("td", "th") and "tbody" in e["parents"]]  # fmt: skip
        rows = [cells[i : i + len(columns)] for i in range(0, len(cells), len(columns))]
        found[page.all("caption")[0]["text"]] = (columns, rows)
    return found


def save(run, details=True, **options):
    """A run folder with `shp` in it, without pictures; returns the run."""
    probes, shp, clusters, snrs = measure(names=NAMES)
    found = None
    if details:
        torch.manual_seed(1)
        model = TinyModel()
        null = analysis.measure_null(model, random_probes(model), random_batches(), draws=2)
        found = analysis.measure_details(shp, clusters, null=null, samples=50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lsmha_fast.analysis.report.plot_shp", lambda *_, **__: [])
        analysis.write_report(
            run / "shp", probes, shp, clusters, snrs, found, title=f"pets (generated) {EVIL}",
            origin={"command": f"lsmha shp {EVIL}", "versions": {"torch": "9"}}, **options,
        )  # fmt: skip
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("page") / "run")


METRICS = [{"epoch": e, "test_accuracy": e / 10, "train_loss": 2.0 / e} for e in (1, 2, 3)]
COMMITTEE = {
    "kind": "lsmha_fast.committee/1", "names": ["run", "other"], "groups": ["a", EVIL],
    "members": [0.5, 0.625], "level": 0.95, "samples": 10, "seed": 0,
    "sizes": {"logit": [
        {"size": 1, "kind": "all", "mean": 0.5625, "lowest": 0.5, "highest": 0.625},
        {"size": 2, "kind": "all", "mean": 0.75, "lowest": 0.75, "highest": 0.75},
        {"size": 2, "kind": "distinct", "mean": 0.75, "lowest": 0.75, "highest": 0.75},
    ]},
    "comparisons": {"logit": [
        {"what": "all 2 - mean member", "difference": 0.1875, "low": -0.01, "high": 0.2,
         "p_value": 0.04},
    ]},
}  # fmt: skip
PRUNE = {
    "criterion": "cover", "split": "test", "choices": {"budget": 3}, "command": "lsmha prune RUN",
    "versions": {"torch": "8"},
    "rows": [
        {"method": m, "seed": s, "removed": r, "kept_per_block": [2, 4], "accuracy_before": 0.75,
         "accuracy_after": 0.75 - r / 100, "accuracy_finetuned": None, "ms_before": 2.0,
         "ms_after": 1.5, "macs_before": 100, "macs_after": 90}
        for m in ("shp", EVIL) for s in (0, 1) for r in (1, 2)
    ],
}  # fmt: skip
LATENCY = {
    "device": "a processor", "dtype": "fp32",
    "skipped": [{"variant": "compiled", "dtype": "bf16", "batch": 1, "reason": EVIL}],
    "command": "lsmha latency RUN", "versions": {},
    "rows": [
        {"variant": v, "dtype": t, "batch": b, "p50_ms": 2.0 * b, "p95_ms": 3.0 * b,
         "p99_ms": 4.0 * b, "images_per_s": 500.0}
        for v, t in (("eager", "fp32"), ("folded", "bf16")) for b in (1, 8)
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of which everything was measured."""
    torch.manual_seed(0)
    run = save(tmp_path_factory.mktemp("whole") / "run")
    for place, record in (("../committee", COMMITTEE), ("prune", PRUNE), ("latency", LATENCY)):
        (run / place).mkdir()
        (run / place / "summary.json").write_text(json.dumps(record))
    return run


def html_of(run, date=DAY, **options):
    measured = read_measured(run, metrics=METRICS, config={"model": EVIL}, **options)
    commands = {"Training": f"lsmha train {EVIL}"}
    return render(measured, commands=commands, versions={"torch": "7"}, date=date)


def test_page_asks_for_nothing_and_runs_only_its_own_script(whole):
    html = html_of(whole)
    page = Page(html)
    for element in page.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert element.get(name, "#").startswith(("#", "data:"))
        assert not any(name.startswith("on") or name == "style" for name in element)
    # addresses may stand in text, never where the browser would fetch them
    assert not re.search(r"https?://|@import|url\(", html)
    style, scripts = page.all("style")[0], page.all("script")
    assert [s.get("type") for s in scripts] == ["application/json", None]
    policy = next(e for e in page.all("meta") if "http-equiv" in e)["content"]
    for kind, text in (("style", style["text"]), ("script", scripts[1]["text"])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_names_are_shown_as_text(whole):
    html = html_of(whole)
    assert EVIL not in html
    found = tables(html)
    assert [row[0] for row in found["Labels: heads that recognise them, and SNR*"][1]] == NAMES
    assert {row[0] for row in found["Every pruned model"][1]} == {"shp", EVIL}
    assert found["Members"][1][1] == ["other", EVIL, "62.50 %"]
    page = Page(html)
    assert json.loads(page.all("script")[0]["text"])["classes"] == NAMES
    assert page.all("title")[0]["text"].startswith(f"pets (generated) {EVIL}: ")
    assert f"lsmha shp {EVIL}" in [e["text"] for e in page.all("pre")]
    assert any(e["text"] == "generated data" for e in page.all("strong"))


def test_tables_hold_what_was_measured(run):
    summary = json.loads((run / "shp" / "summary.json").read_text())
    found = tables(html_of(run))
    columns, rows = found["Averages by block"]
    assert [row[0] for row in rows] == ["block 2", "block 3"]
    for row, block in zip(rows, summary["blocks"], strict=True):
        cells = dict(zip(columns, row, strict=True))
        assert cells["probe accuracy"] == f"{100 * block['accuracy']:.2f} %"
        assert cells["external noise"] == digits(block["external_noise"])
        assert cells["heads"] == str(len(block["recognizes"]))
    columns, rows = found["Beside the null models"]
    for row in rows:
        cells = dict(zip(columns, row, strict=True))
        if cells["quantity"] != "SNR*":
            continue
        block = next(b for b in summary["blocks"] if b["name"] == cells["block"])
        means = {kind: null_means(draws)["snr_unclipped"] for kind, draws in block["null"].items()}
        assert cells["measured"] == digits(block["snr_unclipped"])
        assert cells["interval"] == " to ".join(map(digits, block["bootstrap"]["snr_unclipped"]))
        assert cells["permuted labels"] == digits(means["labels"])
        assert cells["random probes"] == digits(means["probes"])
    assert len(found["All heads"][1]) == 8
    assert len(found["Averages by threshold"][1]) == 2 * 8
    lost = found["Sharing out by block"][1][0][-1]
    assert lost == str(summary["blocks"][0]["symmetry"]["lost_labels"])


def test_results_of_other_commands_are_shown(whole):
    html = html_of(whole)
    found = tables(html)
    row = ["logit", "all 2 - mean member", "+18.75", "-1.00", "+20.00", "0.04"]
    assert found["Differences, paired bootstrap over images"][1] == [row]
    columns, rows = found["Every pruned model"]
    assert "fine-tuned" not in columns  # nobody was
    assert dict(zip(columns, rows[1], strict=True))["after"] == "73.00 %"
    assert found["Every measurement"][1][1][:5] == ["eager", "fp32", "8", "16.0", "24.0"]
    assert found["Not measured"][1] == [["compiled", "bf16", "1", EVIL]]
    texts = [e["text"] for e in Page(html).all("pre")]
    assert {"lsmha prune RUN", "lsmha latency RUN"} <= set(texts)
    assert "Not measured for this page" not in html


def test_missing_parts_say_how_to_make_them(tmp_path):
    html = html_of(save(tmp_path / "run", details=False))
    page = Page(html)
    lines = [e["text"] for e in page.all("p") if e.get("class") == "missing"]
    for command in ("lsmha committee RUN RUN", "lsmha prune RUN", "lsmha latency RUN", "lsmha shp"):
        assert any(command in line for line in lines), command
    assert all("\n" not in line for line in lines)
    ids = [e["id"] for e in page.all("section")]
    assert [e["href"][1:] for e in page.all("a") if "nav" in e["parents"]] == ids
    assert "Beside the null models" not in tables(html)


def test_every_table_can_be_sorted(whole):
    html = html_of(whole)
    for caption, (columns, rows) in tables(html).items():
        assert rows, caption
        assert all(len(row) == len(columns) for row in rows), caption
        assert len(set(columns)) == len(columns), caption
    page = Page(html)
    for cell in page.all("td"):
        assert ("data-v" in cell) == (cell.get("class") == "n")
        if cell.get("data-v"):
            float(cell["data-v"])
    assert all(e.get("scope") in ("col", "row") for e in page.all("th"))


def test_same_results_same_bytes_but_for_the_date(whole):
    first = html_of(whole)
    assert html_of(whole) == first
    other = html_of(whole, date=datetime.date(2027, 3, 4))
    assert other.replace("2027-03-04", "2026-01-02") == first


@pytest.mark.parametrize("bias", [False, True])
def test_packed_fields_are_the_matrices(tmp_path, bias):
    run = save(tmp_path / "run", details=False)
    measured = read_measured(run)
    shp = measured.shp
    object.__setattr__(shp, "bias", bias)
    shp.__dict__.pop("matrices", None)
    data = page_data(measured)

    def unpack(text, kind, *shape):
        return np.frombuffer(base64.b64decode(text), kind).reshape(shape)

    K = len(NAMES)
    for m, block in enumerate(data["blocks"]):
        H, D = block["heads"], block["rank"]
        means, weights = (unpack(block[n], "<i2", H, K, D) for n in ("means", "weights"))
        scale = unpack(block["scale"], "<f4", H, D)
        fields = np.einsum("hid,hjd,hd->hij", means.astype(float), weights.astype(float), scale)
        true = shp.matrix(m).numpy()
        assert np.abs(fields - true).max() <= 1e-3 * np.abs(true).max()
        found = measured.clusters[m]
        assert (unpack(block["assignment"], "<i2", H, K) == found.assignment.numpy()).all()
        assert (unpack(block["order"], "<i2", H, K) == found.order.numpy()).all()
        own = unpack(block["own"], "u1", H, K)
        assert ((own > 0) == found.recognized.numpy()).all()


def test_what_does_not_fit_is_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="run `lsmha shp` first"):
        read_measured(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no committee"):
        read_measured(run, committee=tmp_path)
    copy = save(tmp_path / "run", details=False)
    path = copy / "shp" / "summary.json"
    text = path.read_text()
    record = json.loads(text)
    for change, words in (
        ({"kind": "other"}, "not a summary of `lsmha shp`"),
        ({"blocks": record["blocks"][:1]}, "are not those of shp.npz"),
        ({"choices": {**record["choices"], "threshold": 0.9}}, "but shp.npz has"),
        ({"choices": {}}, "not a complete summary"),
    ):
        path.write_text(json.dumps({**record, **change}))
        with pytest.raises(ValueError, match=words):
            read_measured(copy)
    path.write_text(text[:-20])
    with pytest.raises(ValueError, match="not readable JSON"):
        read_measured(copy)
    path.write_text(text)
    for name, record in (("prune", {"rows": [{"method": "x"}]}), ("latency", {})):
        (copy / name).mkdir()
        (copy / name / "summary.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="not a complete record"):
            read_measured(copy)
        (copy / name / "summary.json").unlink()


def test_committee_is_found_only_where_the_run_is_a_member(whole, tmp_path):
    assert read_measured(whole).committee == COMMITTEE
    other = save(tmp_path / "stranger", details=False)
    (tmp_path / "committee").mkdir()
    (tmp_path / "committee" / "summary.json").write_text(json.dumps(COMMITTEE))
    assert read_measured(other).committee is None
    assert read_measured(other, committee=whole.parent / "committee").committee == COMMITTEE


def test_a_damaged_committee_is_refused(whole, tmp_path):
    entry = {**COMMITTEE["sizes"]["logit"][0], "kind": "secret"}
    for change in ({"sizes": {"logit": [entry]}}, {"members": [0.5]}, {"comparisons": None}):
        (tmp_path / "summary.json").write_text(json.dumps({**COMMITTEE, **change}))
        with pytest.raises(ValueError, match="not a complete record"):
            read_measured(whole, committee=tmp_path)


def test_only_an_earlier_page_is_replaced(run, tmp_path):
    measured = read_measured(run)
    path = write_page(tmp_path / "a.html", measured, commands={}, versions={})
    write_page(path, measured, commands={"x": "second"}, versions={})
    assert "second" in path.read_text()
    thesis = tmp_path / "thesis.html"
    thesis.write_text("years of work")
    with pytest.raises(ValueError, match="not an earlier report"):
        write_page(thesis, measured, commands={}, versions={})
    assert thesis.read_text() == "years of work"
    with pytest.raises(ValueError, match="is a folder"):
        check_page(tmp_path)


def test_chart_leaves_gaps_and_names_its_points():
    values = Series(
        "measured", [1.0, None, float("inf"), 4.0], [(0.5, 2), *[(None, None)] * 2, (3, 9)]
    )
    svg = line_chart("SNR & co", [1, 2, 3, 4], [values, Series("null", [1] * 4)], x_title="block")
    page = Page(str(svg))
    line = next(e for e in page.all("path") if e["class"] == "l s0 d0" and "L" not in e["d"][1:])
    assert line["d"].count("M") == 2
    titles = [e["text"] for e in page.all("title")]
    assert titles[:2] == ["measured, block 1: 1 (0.5 to 2)", "measured, block 4: 4 (3 to 9)"]
    assert len(titles) == 2 + 4
    assert nice_ticks(0, 9)[-1] >= 9
    assert max(t for t in nice_ticks(0, 9)) <= 10


@pytest.mark.parametrize("low, high", [(0, 0), (0.1, 0.1), (-3, 7), (0, 1e-9), (5, 12345)])
def test_ticks_span_the_values(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 9
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_numbers_are_written_as_people_do():
    texts = [number_text(v) for v in (None, float("inf"), float("nan"), 3.0, 0.01234, 4.1, 56.78)]
    assert texts == ["\u2013", "\u221e", "not a number", "3", "0.0123", "4.10", "56.8"]
    assert number_text(0.1234, True) == "12.34 %"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_page_in_a_browser(whole, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(html_of(whole))
    browser = Browser(tmp_path / "profile")
    try:
        for width, dark in ((390, False), (390, True), (1440, False)):
            browser.open(path, width, dark=dark)
            assert browser.run("document.documentElement.scrollWidth") <= width
            ground = browser.run("getComputedStyle(document.body).backgroundColor")
            assert (int(re.findall(r"\d+", ground)[0]) < 128) == dark
        _use_keyboard(browser)
        assert browser.messages == []
        assert set(browser.requests) == {path.resolve().as_uri()}
    finally:
        browser.close()


def _use_keyboard(browser):
    """Sort a table, open a head and read elements, all without a pointer."""
    column = "[...document.querySelectorAll('#labels tbody tr')].map(r => r.cells[2].textContent)"
    before = [int(v) for v in browser.run(column)]
    browser.run("document.querySelectorAll('#labels thead button')[2].focus()")
    browser.press("Enter")
    assert [int(v) for v in browser.run(column)] == sorted(before)
    browser.press("Enter")
    assert [int(v) for v in browser.run(column)] == sorted(before, reverse=True)
    assert browser.run("document.querySelectorAll('#gallery button').length") == 5
    browser.run("document.querySelector('#gallery button').focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('#large').open")
    browser.run("document.querySelector('#large canvas').focus()")
    browser.press("ArrowRight")
    assert browser.run("document.querySelector('#large-read').textContent").startswith("True ")
    browser.press("Escape")
    assert not browser.run("document.querySelector('#large').open")
    browser.run("document.querySelector('#map-canvas').focus()")
    browser.press("ArrowDown")
    assert "head 1: " in browser.run("document.querySelector('#map-read').textContent")
