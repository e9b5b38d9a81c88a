"""The tables of docs/findings.md are those of docs/findings.json."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def findings():
    spec = importlib.util.spec_from_file_location("findings", ROOT / "scripts" / "findings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_the_page_are_those_of_the_numbers(findings):
    page, data = findings.PAGE.read_text(), json.loads(findings.JSON.read_text())
    assert findings.fill(page, findings.tables(data)) == page
    assert "(generated)" in data["title"]


def test_a_changed_number_or_a_lost_table_is_seen(findings):
    page, data = findings.PAGE.read_text(), json.loads(findings.JSON.read_text())
    data["runs"][0]["blocks"][0]["snr"] += 1
    assert findings.fill(page, findings.tables(data)) != page
    with pytest.raises(ValueError, match="0 places for the table runs"):
        findings.fill(page.replace("<!-- table: runs -->", ""), findings.tables(data))
