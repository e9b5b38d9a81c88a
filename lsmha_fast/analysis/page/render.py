"""From results to one HTML file: no network, no other file, nothing in it that could run."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..._files import atomic_file
from ..._version import __version__
from . import figures, tables
from .data import page_data
from .source import Measured

GENERATOR = "lsmha_fast report"


def write_page(
    path: str | Path,
    measured: Measured,
    *,
    commands: Mapping[str, str],
    versions: Mapping[str, str],
) -> Path:
    """Write the page of a run as one self-contained HTML file, whole or not at all.

    Args:
        path: the file; one that is there must be an earlier page.
        measured: what `read_measured` read.
        commands: what was done -> the command line that did it.
        versions: of what made the page, name -> version.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: jinja2 is missing (extra `report`).
        ValueError: `path` is a folder or a file that is not such a page.
    """
    path = Path(path)
    check_page(path)
    html = render(measured, commands=commands, versions=versions, date=datetime.date.today())
    with atomic_file(path) as part:
        part.write_text(html, encoding="utf-8")
    return path


def check_page(path: Path) -> None:
    """Refuse to write over anything but an earlier page.

    Raises:
        ValueError: `path` is a folder or a file of another kind.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of an HTML file")
    if path.exists() and GENERATOR.encode() not in path.read_bytes()[:600]:
        raise ValueError(f"{path} exists and is not an earlier report; name another file")


def render(
    measured: Measured,
    *,
    commands: Mapping[str, str],
    versions: Mapping[str, str],
    date: datetime.date,
) -> str:
    """The page as text; the same arguments give the same text."""
    import jinja2
    from markupsafe import Markup

    package = files(__package__)
    css, js, html = (
        (package / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html")
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    summary, shp = measured.summary, measured.shp
    title = str(summary.get("title", "single-head performance"))
    return environment.from_string(html).render(
        title=title,
        generator=f"{GENERATOR} {__version__}",
        generated="generated" in title,
        date=date.isoformat(),
        css=Markup(css),
        css_hash=_hash(css),
        js=Markup(js),
        js_hash=_hash(js),
        summary=summary,
        shp=shp,
        images=int(shp.counts.sum()),
        heads=sum(sums.shape[1] for sums in shp.sums),
        empty=[n for n, c in zip(shp.class_names, shp.counts.tolist(), strict=True) if c == 0],
        sections=_sections(measured),
        choices=_choices(measured),
        config=tables.pairs(measured.config),
        versions=_versions(measured, versions),
        commands=_commands(measured, commands),
        data=page_data(measured),
    )


def _hash(text: str) -> str:
    """What the page's security policy calls a piece of its own style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _sections(measured: Measured) -> dict[str, dict[str, Any]]:
    """Charts and tables by section; both are empty where a part was not measured."""
    m = measured
    sections: dict[str, dict[str, Any]] = {
        "blocks": {
            "charts": figures.block_charts(m),
            "tables": [tables.block_table(m), tables.null_table(m)],
        },
        "training": {"charts": figures.training_charts(m.metrics), "tables": []},
        "heads": {"charts": [], "tables": [tables.head_table(m)]},
        "labels": {"charts": [], "tables": [tables.label_table(m)]},
        "sharing": {"charts": [], "tables": [tables.sharing_table(m)]},
        "sweep": {"charts": figures.sweep_charts(m), "tables": [tables.sweep_table(m)]},
        "committee": {"charts": [], "tables": []},
        "prune": {"charts": [], "tables": []},
        "latency": {"charts": [], "tables": []},
    }
    if m.committee is not None:
        sections["committee"] = {
            "charts": figures.committee_charts(m.committee),
            "tables": tables.committee_tables(m.committee),
        }
    if m.prune is not None:
        sections["prune"] = {
            "charts": figures.prune_charts(m.prune),
            "tables": [tables.prune_table(m.prune)],
        }
    if m.latency is not None:
        sections["latency"] = {
            "charts": figures.latency_charts(m.latency),
            "tables": tables.latency_tables(m.latency),
        }
    for section in sections.values():
        section["tables"] = [
            table for table in section["tables"] if table is not None and table.rows
        ]
    return sections


def _choices(measured: Measured) -> list[tuple[str, str]]:
    """Everything about the numbers that is ours, by name."""
    summary = measured.summary
    bootstrap = summary["blocks"][0].get("bootstrap") or {}
    named = {
        "": summary["choices"],
        "probe ": summary.get("probe_settings") or {},
        "interval ": {k: bootstrap[k] for k in ("level", "samples", "seed") if k in bootstrap},
        "committee ": _only(measured.committee, "level", "samples", "seed"),
        "pruning ": {
            **_only(measured.prune, "criterion", "split", "choice_split"),
            **((measured.prune or {}).get("choices") or {}),
        },
        "latency ": _only(measured.latency, "device", "clock"),
    }
    return [
        (prefix + name, value)
        for prefix, record in named.items()
        for name, value in tables.pairs(record)
    ]


def _only(record: Mapping[str, Any] | None, *names: str) -> dict[str, Any]:
    return {name: record[name] for name in names if record and name in record}


def _commands(measured: Measured, commands: Mapping[str, str]) -> dict[str, str]:
    """The command lines, those that other commands left in their records among them."""
    found = dict(commands)
    records = {
        "Measurement": measured.summary.get("origin"),
        "Committee": (measured.committee or {}).get("origin"),
        "Pruning": measured.prune,
        "Latency": measured.latency,
    }
    for name, record in records.items():
        if record and record.get("command"):
            found[name] = str(record["command"])
    return found


def _versions(measured: Measured, versions: Mapping[str, str]) -> list[tuple[str, str]]:
    """Of what measured, where that was kept, and of what made the page."""
    origin = (measured.summary.get("origin") or {}).get("versions") or {}
    records = {
        "measurement": origin,
        "pruning": (measured.prune or {}).get("versions") or {},
        "latency": (measured.latency or {}).get("versions") or {},
        "this page": versions,
    }
    return [
        (f"{name} ({what})", str(value))
        for what, record in records.items()
        for name, value in record.items()
    ]
