"""One HTML page that shows a run: needs no network, opens from disk."""

from __future__ import annotations

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..._files import atomic_file
from ..._version import __version__
from ..shp import SHP
from .source import Measured
from .tables import (
    block_table,
    extra_sections,
    head_rows,
    label_table,
    pairs,
    sensitivity,
    sensitivity_table,
)

GENERATOR = "lsmha_fast report"


def write_page(path: str | Path, measured: Measured, *, commands: dict[str, str]) -> Path:
    """Write the report of a run as one self-contained HTML file, whole or not at all.

    Args:
        path: the file; one that is there must be an earlier report.
        measured: what `read_measured` read.
        commands: what was done -> the command line that did it.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: jinja2 is missing (extra `report`).
        ValueError: `path` is a folder or a file that is not a report.
    """
    path = Path(path)
    check_page(path)
    html = render(measured, commands)
    with atomic_file(path) as part:
        part.write_text(html, encoding="utf-8")
    return path


def check_page(path: Path) -> None:
    """Refuse to write over anything but an earlier report.

    Raises:
        ValueError: `path` is a folder or a file of another kind.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of an HTML file")
    if path.exists() and GENERATOR.encode() not in path.read_bytes()[:600]:
        raise ValueError(f"{path} exists and is not an earlier report; name another file")


def render(measured: Measured, commands: dict[str, str]) -> str:
    """The page as text."""
    import jinja2
    from markupsafe import Markup

    from .figures import figures

    package = files(__package__)

    def part(name: str) -> str:
        return (package / name).read_text(encoding="utf-8")

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = _number
    summary, shp = measured.summary, measured.shp
    sweep = sensitivity(shp, summary["choices"])
    title = str(summary.get("title", "single-head performance"))
    return environment.from_string(part("page.html")).render(
        title=title,
        generator=f"{GENERATOR} {__version__}",
        generated="generated" in title,
        css=Markup(part("page.css")),
        js=Markup(part("page.js")),
        summary=summary,
        shp=shp,
        images=int(shp.counts.sum()),
        empty=[n for n, c in zip(shp.class_names, shp.counts.tolist(), strict=True) if c == 0],
        figures=figures(measured, sweep),
        blocks=block_table(measured),
        labels=label_table(measured),
        heads=head_rows(measured),
        sweep=sensitivity_table(sweep),
        extras=extra_sections(measured.extras),
        choices=pairs(summary["choices"]),
        probe_settings=pairs(summary.get("probe_settings") or {}),
        config=pairs(measured.config),
        versions=pairs(versions(summary)),
        commands=commands,
        data=page_data(measured),
    )


def versions(summary: dict[str, Any]) -> dict[str, str]:
    """Of what measured, where that was kept, and of what made the page."""
    import platform

    measured = (summary.get("origin") or {}).get("versions", {})
    here = {"lsmha_fast": __version__, "torch": torch.__version__, "numpy": np.__version__}
    here["Python"] = platform.python_version()
    return {
        **{f"{name} (measurement)": str(value) for name, value in measured.items()},
        **{f"{name} (this page)": value for name, value in here.items()},
    }


def page_data(measured: Measured) -> dict[str, Any]:
    """What the page's script draws from: names, clusters, and the fields as their factors.

    The K x K matrix of a head is the product of two K x D factors, which are far smaller. Each
    column is kept as 16-bit integers; `scale` (H, D) turns products of them back into fields.
    """
    shp, threshold = measured.shp, float(measured.summary["choices"]["threshold"])
    blocks = []
    for m, found in enumerate(measured.clusters):
        means, weights, scale = _factors(shp, m)
        blocks.append(
            {
                "name": shp.block_names[m],
                "heads": means.shape[0],
                "rank": means.shape[2],
                "means": _pack(means),
                "weights": _pack(weights),
                "scale": _pack(scale),
                "assignment": _pack(found["assignment"].astype("<i2")),
                "order": _pack(found["order"].astype("<i2")),
                "clusters": found["number"].tolist(),
                "noise": (
                    found["internal_noise"] + found["column_noise"] + found["rest_noise"]
                ).tolist(),
            }
        )
    return {
        "classes": list(shp.class_names),
        "threshold": threshold,
        "normalize": str(measured.summary["choices"].get("normalize", "matrix")),
        "blocks": blocks,
    }


def _factors(shp: SHP, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class means and weights of a block, (H, K, D) int16 each, and their scale (H, D) float32."""
    counts = shp.counts.double()[:, None, None]
    means = (shp.sums[block] / counts.clamp(min=1)).transpose(0, 1)  # (H, K, D)
    weights = shp.fc_weight[block].double().transpose(0, 1)
    if shp.bias:  # one more channel: 1 for every label with images, and the bias
        there = (shp.counts > 0).double().expand(len(means), -1)[..., None]
        means = torch.cat([means, there], 2)
        bias = shp.fc_bias[block].double().expand(len(weights), -1)[..., None]
        weights = torch.cat([weights, bias], 2)
    packed, scale = [], torch.ones(means.shape[0], means.shape[2], dtype=torch.float64)
    for factor in (means, weights):
        step = factor.abs().amax(1).clamp(min=1e-30) / 32767
        packed.append((factor / step[:, None]).round().numpy().astype("<i2"))
        scale = scale * step
    return packed[0], packed[1], scale.numpy().astype("<f4")


def _pack(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _number(value: object) -> str:
    from .charts import number_text

    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number_text(value) if plain or value is None else str(value)  # type: ignore[arg-type]
