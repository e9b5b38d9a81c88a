"""Keep what a run of the benchmarks measured, as small JSON files that documents are made of.

pytest benchmarks/ --benchmark-only --benchmark-json=FILE.json
python -m benchmarks.record FILE.json ...          # into benchmarks/results/<processor>/

One file per benchmark group: machine, versions, command, and for every case and method the median,
spread and rounds, the work of the definition, the error against fp64, and the share of the limit.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# names of the parameter that says how a thing is computed
METHODS = ("method", "pipeline", "backend")
# what may stand in `extra_info` and is kept
FACTS = ("flops", "bytes", "exps", "error", "images_per_second", "step_bytes", "limit")


def read(path: Path) -> dict[str, dict]:
    """Results by group from one JSON file of pytest-benchmark.

    Raises:
        ValueError: the file is not one, or was written without `benchmarks/conftest.py`.
    """
    try:
        raw = json.loads(path.read_text())
        machine, entries = raw["machine_info"]["lsmha_fast"], raw["benchmarks"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no JSON of `pytest benchmarks/`: {error!r}") from None
    groups: dict[str, dict] = {}
    for entry in entries:
        params = entry["params"] or {}
        method = next((params[name] for name in METHODS if name in params), None)
        if method is None:
            continue
        group = groups.setdefault(
            slug(entry["group"]),
            {"date": raw["datetime"][:10], **machine, "cases": {}},
        )
        row = _row(entry, machine["rates"])
        group["cases"].setdefault(case_of(entry, method), {})[method] = row
    return groups


def case_of(entry: dict, method: str) -> str:
    """The ids of the other parameters."""
    case = entry["param"].removeprefix(method).removesuffix(method).strip("-")
    return case.replace(f"-{method}-", "-")


def _row(entry, rates) -> dict:
    stats, facts = entry["stats"], entry.get("extra_info", {})
    # what would take too long is timed in part and says what the whole takes, and what was measured
    # in turns with others says what came out
    whole = next(
        (facts[k] for k in ("seconds", "seconds_for_all_heads") if k in facts), stats["median"]
    )
    row = {"median": whole, "iqr": stats["iqr"], "rounds": stats["rounds"]}
    row |= {k: facts[k] for k in FACTS if k in facts}
    limit = facts.get("limit") or least_seconds(facts, rates)
    if limit is not None:
        row["share"] = limit / whole
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}


def least_seconds(facts: dict, rates: dict | None) -> float | None:
    """Time that the slowest unit needs for the work of the definition, or None if unknown.

    A GPU has units of their own for products and exponentials; in a CPU they share one.
    """
    work = {k: facts[k] / rates[k] for k in ("bytes", "flops", "exps") if k in facts and rates}
    if not work:
        return None
    if str(facts.get("device", "")).startswith("cpu"):
        return max(work.get("bytes", 0), work.get("flops", 0) + work.get("exps", 0))
    return max(work.values())


def slug(name: str) -> str:
    """Name of the folder for a processor, such as `nvidia-h200`, or of the file for a group."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(groups: dict[str, dict], results: Path) -> list[Path]:
    """One file per group; cases that this run did not measure are kept if the machine is equal."""
    written = []
    for name, group in groups.items():
        path = results / slug(group["processor"]) / f"{name}.json"
        if path.exists():
            before = json.loads(path.read_text())
            if before["versions"] == group["versions"]:
                group["cases"] = {**before["cases"], **group["cases"]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(group, indent=1) + "\n")
        written.append(path)
    return written


def main(arguments: list[str] | None = None) -> int:
    """Convert the files; exit code 2 where one is missing or of another kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    try:
        found = [read(path) for path in options.files]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for groups in found:
        for path in write(groups, options.results):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
