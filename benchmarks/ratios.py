"""Tables of ratios from the JSON files of pytest-benchmark, for documents and for eyes.

python -m benchmarks.ratios FILE.json ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

# the method that the others are compared with: the op with its default backend
OURS = "ours"

Times = dict[str, dict[str, float]]  # case -> method -> median seconds


def read(paths: Iterable[str]) -> dict[str, Times]:
    """Medians by benchmark group, case and method; the case is the other parameters' ids."""
    groups: dict[str, Times] = {}
    for path in paths:
        for entry in json.loads(Path(path).read_text())["benchmarks"]:
            method = (entry["params"] or {}).get("method")
            if method is None:
                continue
            case = entry["param"].removeprefix(method).removesuffix(method).strip("-")
            case = case.replace(f"-{method}-", "-")
            times = groups.setdefault(entry["group"], {}).setdefault(case, {})
            times[method] = entry["stats"]["median"]
    return groups


def table(times: Times) -> list[str]:
    """Markdown lines: our time, then how many times as long every other method takes."""
    methods = list(dict.fromkeys(m for case in times.values() for m in case if m != OURS))
    lines = [f"| case | {OURS} | " + " | ".join(methods) + " |", "|---" * (len(methods) + 2) + "|"]
    for case, seconds in times.items():
        if OURS not in seconds:
            continue
        ours = seconds[OURS]
        ratios = [f"{seconds[m] / ours:.2f}x" if m in seconds else "" for m in methods]
        lines.append(f"| {case} | {duration(ours)} | " + " | ".join(ratios) + " |")
    return lines


def duration(seconds: float) -> str:
    """Three digits in the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def main(paths: list[str]) -> int:
    """Print one table per group; exit code 2 without files or where a file is missing."""
    missing = [p for p in paths if not Path(p).is_file()]
    if missing or not paths:
        print(f"usage: python -m benchmarks.ratios FILE.json ...; missing: {missing}")
        return 2
    for group, times in sorted(read(paths).items()):
        lines = table(times)
        if len(lines) > 2:
            print("\n".join([f"\n{group}\n", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
