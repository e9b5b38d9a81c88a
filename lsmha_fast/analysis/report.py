"""The folder `lsmha shp` leaves: arrays, probes, a summary and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .._files import atomic_folder
from ._io import save_npz
from .clusters import Clusters
from .details import BlockDetails
from .plots import plot_shp
from .probes import Probes
from .shp import SHP
from .snr import SNR
from .summary import block_numbers, choices, summarize

_KIND = "lsmha_fast.report/1"


def write_report(
    folder: str | Path,
    probes: Probes,
    shp: SHP,
    clusters: Sequence[Clusters],
    snrs: Sequence[SNR],
    details: Sequence[BlockDetails] | None = None,
    *,
    title: str,
    origin: Mapping[str, object] | None = None,
) -> list[Path]:
    """Write everything that was measured into a folder, all of it or nothing.

    Args:
        folder: a new folder, or one that an earlier call made, which is replaced.
        probes, shp: what was measured.
        clusters, snrs: one per block.
        details: what `measure_details` gave, one per block.
        title: what was measured, with the data set's name, "(generated)" where it is; on every
            picture.
        origin: what to keep beside the results, such as the command and versions.

    Returns:
        The files: `summary.json`, `summary.txt`, `shp.npz` (`SHP.load`), `probes.safetensors`
        (`Probes.load`), `clusters.npz`, and the pictures.

    Raises:
        ValueError: the folder exists and holds files that are not of an earlier report.
    """
    folder = Path(folder)
    check_folder(folder)
    with atomic_folder(folder) as new:
        pictures = plot_shp(new, probes, shp, clusters, snrs, title=title)
        arrays = [
            shp.save(new / "shp.npz"),
            probes.save(new / "probes.safetensors"),
            _save_clusters(new / "clusters.npz", shp, clusters, snrs),
        ]
        text = new / "summary.txt"
        lines = summarize(probes, shp, clusters, snrs, details)
        text.write_text("\n".join([title, *lines]) + "\n")
        record = _record(probes, shp, clusters, snrs, details)
        names = ["summary.json", *(p.name for p in (text, *arrays, *pictures))]
        record = {"kind": _KIND, "title": title, "files": names, **record}
        if origin is not None:
            record["origin"] = dict(origin)
        (new / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    return [folder / name for name in names]


def check_folder(folder: str | Path) -> None:
    """Refuse a folder that `write_report` would refuse, before hours of measuring.

    Raises:
        ValueError: `folder` is a file, or holds files that are not of an earlier report.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found = {path.name for path in folder.iterdir()}
    try:
        record = json.loads((folder / "summary.json").read_text()) if found else {"files": []}
        foreign = found - set(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        foreign = found
    if foreign:
        raise ValueError(
            f"{folder} holds files that are not of an earlier report ({', '.join(sorted(foreign))}"
            "); name another folder or move them"
        )


def _save_clusters(path: Path, shp: SHP, clusters: Sequence[Clusters], snrs: Sequence[SNR]) -> Path:
    """Clusters and ratios of every block as arrays, `<name>.<block number from 0>`."""
    arrays = {}
    for m, (found, snr) in enumerate(zip(clusters, snrs, strict=True)):
        for name, value in {**found._asdict(), **snr._asdict()}.items():
            if hasattr(value, "numpy"):
                arrays[f"{name}.{m}"] = value.numpy()
    info = {
        "kind": "lsmha_fast.clusters/1",
        "block_names": shp.block_names,
        "class_names": shp.class_names,
        **choices(shp, clusters[0]),
    }
    save_npz(path, arrays, info)
    return path


def _record(
    probes: Probes,
    shp: SHP,
    clusters: Sequence[Clusters],
    snrs: Sequence[SNR],
    details: Sequence[BlockDetails] | None,
) -> dict[str, object]:
    blocks = []
    for m, (found, snr) in enumerate(zip(clusters, snrs, strict=True)):
        heads = (found.labels(h) for h in range(len(found.number)))
        blocks.append(
            {
                "name": shp.block_names[m],
                "accuracy": None if probes.accuracy is None else probes.accuracy[m],
                **block_numbers(found, snr),
                **({} if details is None else details[m].record()),
                "recognizes": [[[shp.class_names[i] for i in c] for c in head] for head in heads],
            }
        )
    return {
        "images": int(shp.counts.sum()),
        "class_names": shp.class_names,
        "choices": choices(shp, clusters[0]),
        "probe_settings": dict(probes.settings),
        "model_accuracy": probes.model_accuracy,
        "blocks": blocks,
    }
