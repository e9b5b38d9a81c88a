"""Documents from the kept results: the README's tables, docs/benchmarks.md, and pictures.

python -m benchmarks.report                  # write them
python -m benchmarks.report --check          # exit code 1 where they differ from results/
python -m benchmarks.report --print DIR      # the tables of other results, to the terminal
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.record import RESULTS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGE = ROOT / "docs/benchmarks.md"
BEGIN, END = "<!-- begin: benchmarks.report -->", "<!-- end: benchmarks.report -->"
# what each group measures, in words, and the cases that the README shows (else the first)
GROUPS = {
    "attention-fwd": ("attention, forward", ()),
    "attention-fwd-bwd": ("attention, forward + backward", ()),
    "attention-packed": ("attention on a packed projection, forward + backward", ()),
    "attention-weights": ("attention with averaged weights", ("forward-B2-H64", "both-B2-H64")),
    "conv-stem-fwd": ("convolutional stem, forward", ("(16, 3",)),
    "conv-stem-fwd-bwd": ("convolutional stem, forward + backward", ("(16, 3",)),
    "residual-norm-fwd": ("residual and LayerNorm, forward", ("published-autocast",)),
    "residual-norm-fwd-bwd": (
        "residual and LayerNorm, forward + backward",
        ("published-autocast",),
    ),
    "seq-pool-fwd": ("sequence pooling, forward", ("(8, 256, 64, 4)",)),
    "seq-pool-fwd-bwd": ("sequence pooling, forward + backward", ("(8, 256, 64, 4)",)),
    "head-class-sums": ("class sums of all heads", ()),
    "shp-from-heads": ("SHP of all heads of a block, from its heads", ()),
    "shp-whole": ("SHP of all heads of all blocks, from images", ()),
    "augment-pipeline": ("augmentation, the paper's recipe", ()),
    "augment-crop-and-randaugment": ("crop and RandAugment", ()),
    "linear-fwd": ("linear map, forward", ("(4096, 256, 512)",)),
    "linear-fwd-bwd": ("linear map, forward + backward", ("(4096, 256, 512)",)),
    "modules": ("module", ("infer-out-B2-N256-C256-H64", "train-out-B2-N256-C256-H64")),
    "train-step": ("training step of `cct_7_3x1_32`, batch 16", ("H",)),
    "train-loop": ("the training loop, with its input", ()),
    "inference": ("inference of `cct_7_3x1_32`, batch 1", ("H64-B1", "H16-B1", "H4-B1")),
    "inference-product": ("products of a block", ()),
    "host-overhead": (
        "host time of a call with next to no work, one thread",
        ("attention, forward", "seq_pool, forward", "conv_stem, forward", "module, forward"),
    ),
}
# the method that the others are compared with, where it is not called "ours"
OURS = {
    "augment-pipeline": "device",
    "augment-crop-and-randaugment": "cpp",
    "inference": "optimized",
    "inference-product": "sorted",
}
# other ways to call our own kernels are not what we are compared with, nor is a bound
OWN = re.compile(
    r"^(ours|reference|cpp|triton|cuda|two passes|light|read|features|bare|input)($|-)"
)
HEAD_DIM = re.compile(r"^B(\d+)-N(\d+)-H(\d+)-D(\d+)-p0\.0$")

Groups = dict[str, dict]


def load(results: Path = RESULTS) -> dict[str, Groups]:
    """Results by processor and group, in a fixed order."""
    found: dict[str, Groups] = {}
    for path in sorted(results.glob("*/*.json")):
        group = json.loads(path.read_text())
        found.setdefault(group["processor"], {})[path.stem] = group
    order = {name: i for i, name in enumerate(GROUPS)}
    return {
        processor: dict(sorted(groups.items(), key=lambda g: (order.get(g[0], 99), g[0])))
        for processor, groups in found.items()
    }


def readme_tables(found: dict[str, Groups]) -> str:
    """The README's part: attention by head dim, then every group's first case."""
    parts = []
    for groups in found.values():
        any_group = next(iter(groups.values()))
        parts.append(f"On {_machine(any_group)}, {any_group['date']}:")
        if table := by_head_dim(groups):
            parts.append("\n".join(table))
        parts.append("\n".join(summary(groups)))
    return "\n\n".join(parts)


def by_head_dim(groups: Groups) -> list[str]:
    """Ratios of the other routes to ours by head dim, on the largest common shapes."""
    columns: dict[int, str] = {}
    for case in groups.get("attention-fwd", {"cases": {}})["cases"]:
        if (match := HEAD_DIM.match(case)) and match[2] == "256":
            columns.setdefault(int(match[4]), case)
    if not columns:
        return []
    dims = sorted(columns)
    lines = [
        "| attention, 256 tokens, H x D = 256 | " + " | ".join(f"D={d}" for d in dims) + " |",
        "|---" * (len(dims) + 1) + "|",
    ]
    for group in ("attention-fwd", "attention-fwd-bwd"):
        cases = groups.get(group, {"cases": {}})["cases"]
        rows = [cases.get(columns[d], {}) for d in dims]
        methods = list(dict.fromkeys(m for row in rows for m in row if not OWN.match(m)))
        for method in methods:
            cells = [_ratio(row, method) for row in rows]
            if sum(map(bool, cells)) > 1:
                what = _words(group).removeprefix("attention, ")
                lines.append(f"| {what}: `{method}` / ours | " + " | ".join(cells) + " |")
    return lines


def summary(groups: Groups) -> list[str]:
    """The cases of every group that `GROUPS` names: our time and the other routes, best first."""
    lines = ["| what | case | ours | others, as multiples of ours |", "|---|---|---|---|"]
    for name, group in groups.items():
        if name.startswith("attention-fwd"):
            continue
        picked = GROUPS.get(name, ("", ()))[1] or tuple(group["cases"])[:1]
        for case, row in group["cases"].items():
            ours = _ours(name)
            others = sorted((m for m in row if not OWN.match(m)), key=lambda m: row[m]["median"])
            others = [m for m in others if m != ours]
            if not case.startswith(picked) and not any(p in case for p in picked if "(" in p):
                continue
            if ours in row and others:
                shown = ", ".join(f"`{m}` {_ratio(row, m, ours)}" for m in others)
                time = duration(row[ours]["median"])
                lines.append(f"| {_words(name)} | {case} | {time} | {shown} |")
    return lines


def _words(group: str) -> str:
    return GROUPS.get(group, (group, ()))[0]


def _ours(group: str) -> str:
    return OURS.get(group, "ours")


def _ratio(row: dict, method: str, ours: str = "ours") -> str:
    if ours not in row or method not in row:
        return ""
    return f"{row[method]['median'] / row[ours]['median']:.3g}"


def page(found: dict[str, Groups]) -> str:
    """docs/benchmarks.md: every group, case and method, losers included."""
    parts = [
        "# Benchmarks",
        "Made by `python -m benchmarks.report` from `benchmarks/results/`; measured by "
        "`pytest benchmarks/ --benchmark-only`\nand kept by `python -m benchmarks.record`. Times "
        "are medians of one process; the multiple is to ours; the error is\nthe largest, against "
        "fp64, as a share of the largest value; the share is that of the least time that the "
        "processor's\nslowest unit needs for the work of the definition (its rates were measured "
        "too).",
    ]
    for processor, groups in found.items():
        picture = picture_path(groups)
        parts.append(f"## {processor}")
        parts.append(_machine(next(iter(groups.values()))) + ".")
        if picture.exists():
            parts.append(f"![ratio and share of the limit by head dim]({picture.name})")
        for name, group in groups.items():
            parts.append(f"### {_words(name)}")
            parts.append("\n".join(full_table(group, _ours(name))))
    return "\n\n".join(parts) + "\n"


def full_table(group: dict, ours: str) -> list[str]:
    """Every case and method of a group, fastest first."""
    lines = ["| case | method | median | multiple | error | share |", "|---|---|---|---|---|---|"]
    for case, row in group["cases"].items():
        for method in sorted(row, key=lambda m: row[m]["median"]):
            cell = row[method]
            error = f"{cell['error']:.1e}" if "error" in cell else ""
            share = f"{cell['share']:.0%}" if "share" in cell else ""
            time = duration(cell["median"])
            ratio = _ratio(row, method, ours)
            lines.append(f"| {case} | `{method}` | {time} | {ratio} | {error} | {share} |")
    return lines


def _machine(group: dict) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in group["versions"].items() if k != "lsmha_fast")
    device = "" if group["device"] == group["processor"] else f" ({group['device']})"
    clocks = f"; clocks: {group['clocks']}" if group["clocks"] else ""
    return f"{group['processor']}{device}, {versions}{clocks}"


def duration(seconds: float) -> str:
    """Three digits in the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def picture_path(groups: Groups) -> Path:
    """Where the picture of a processor lies."""
    kind = "cpu" if next(iter(groups.values()))["device"].startswith("cpu") else "gpu"
    return ROOT / f"docs/benchmarks_{kind}.png"


def picture(groups: Groups, path: Path) -> bool:
    """Ratio to `scaled_dot_product_attention` and share of the limit by head dim; False without
    results for it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    drawn = False
    for group, color in (("attention-fwd", "C0"), ("attention-fwd-bwd", "C1")):
        rows = {
            int(match[4]): row
            for case, row in groups.get(group, {"cases": {}})["cases"].items()
            if (match := HEAD_DIM.match(case)) and match[2] == "256" and "ours" in row
        }
        dims = sorted(d for d in rows if "sdpa" in rows[d])
        if not dims:
            continue
        drawn = True
        label = _words(group).removeprefix("attention, ")
        ratios = [rows[d]["sdpa"]["median"] / rows[d]["ours"]["median"] for d in dims]
        left.plot(dims, ratios, "o-", color=color, label=label)
        for method, style in (("ours", "o-"), ("sdpa", "s:")):
            shares = [rows[d][method].get("share", 0) * 100 for d in dims]
            name = "ours" if method == "ours" else "SDPA"
            right.plot(dims, shares, style, color=color, label=f"{name}, {label}")
    left.axhline(1, color="0.6", linewidth=0.8)
    left.set(ylabel="time of SDPA / ours", title="256 tokens, H x D = 256")
    right.set(ylabel="share of the limit, %", title="distance to the limit", ylim=(0, 100))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("channels of a head, D")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    if drawn:
        for axes in (left, right):
            axes.legend(fontsize=7, frameon=False)
        figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return drawn


def with_tables(readme: str, tables: str) -> str:
    """The README with its part between the marks replaced.

    Raises:
        ValueError: a mark is missing.
    """
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md lacks {BEGIN} or {END}")
    head, _, rest = readme.partition(BEGIN)
    return f"{head}{BEGIN}\n{tables}\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str] | None = None) -> int:
    """Write the documents, or say which differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--print", type=Path, metavar="DIR", help="print results of this folder")
    options = parser.parse_args(arguments)
    if options.print is not None:
        print(page(load(options.print)))
        return 0
    found, check = load(), options.check
    if not check:
        for groups in found.values():
            picture(groups, picture_path(groups))
    wanted = {
        README: with_tables(README.read_text(), readme_tables(found)),
        PAGE: page(found),
    }
    differ = [p for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    if not check:
        for path in differ:
            path.write_text(wanted[path])
    for path in differ:
        print(f"{path.relative_to(ROOT)} {'differs' if check else 'written'}")
    return int(check and bool(differ))


if __name__ == "__main__":
    sys.exit(main())
