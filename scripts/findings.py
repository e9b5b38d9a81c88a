"""The numbers, tables and picture of docs/findings.md, from run folders.

python scripts/findings.py collect RUN RUN ... --committee DIR    # writes docs/findings.json
python scripts/findings.py write                                  # fills docs/findings.md, draws
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
JSON, PAGE, PICTURE = DOCS / "findings.json", DOCS / "findings.md", DOCS / "findings.png"
NUMBERS = (
    "accuracy", "clusters", "cluster_size", "internal_noise", "external_noise", "density",
    "heads_per_label", "snr", "snr_unclipped",
)  # fmt: skip
KINDS = ("labels", "probes")


def collect(folders: list[Path], committee: Path) -> dict:
    """Plain numbers of all runs, of their committees, and of how alike their heads are."""
    runs = [read_run(folder) for folder in sorted(folders)]
    record = json.loads((committee / "summary.json").read_text())
    keep = ("names", "groups", "images", "members", "sizes", "comparisons", "level", "samples")
    title = json.loads((folders[0] / "shp" / "summary.json").read_text())["title"]
    return {
        "title": title,
        "runs": runs,
        "committee": {name: record[name] for name in keep},
        "stability": stability(folders),
    }


def read_run(folder: Path) -> dict:
    """What is kept of one run."""
    from lsmha_fast.analysis.null import null_means

    config = json.loads((folder / "config.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "shp" / "summary.json").read_text())
    blocks = []
    for block in summary["blocks"]:
        nulls = {kind: null_means(draws) for kind, draws in block["null"].items()}
        symmetry, sweep = block["symmetry"], block["sweep"]
        blocks.append(
            {
                **{name: rounded(block[name]) for name in NUMBERS},
                "interval": [rounded(v) for v in block["bootstrap"]["snr"]],
                "null": {k: {n: rounded(v.get(n)) for n in NUMBERS[1:]} for k, v in nulls.items()},
                "overlap": rounded(symmetry["mean_overlap"]),
                "chance_overlap": rounded(symmetry["chance_overlap"]),
                "lost_labels": symmetry["lost_labels"],
                "silent_heads": symmetry["silent_heads"],
                "sweep": {
                    str(t): rounded(v)
                    for t, v in zip(sweep["thresholds"], sweep["snr"], strict=True)
                },
            }
        )
    return {
        "name": folder.name,
        "model": config["model"],
        "heads": config["num_heads"],
        "seed": config["seed"],
        "epochs": len(metrics),
        "minutes": rounded(sum(row["seconds"] for row in metrics) / 60),
        "test_accuracy": metrics[-1]["test_accuracy"],
        "measured_accuracy": rounded(summary["model_accuracy"]),
        "blocks": blocks,
    }


def stability(folders: list[Path]) -> dict[str, list[dict]]:
    """Heads -> per block, the likeness of matched heads over all pairs of seeds, and chance."""
    from lsmha_fast.analysis import SHP, stability_over_seeds

    groups: dict[int, list[Path]] = {}
    for folder in sorted(folders):
        config = json.loads((folder / "config.json").read_text())
        groups.setdefault(config["num_heads"], []).append(folder)
    found = {}
    for heads, members in sorted(groups.items()):
        fields = [SHP.load(folder / "shp" / "shp.npz").matrices for folder in members]
        found[str(heads)] = []
        for m in range(len(fields[0])):
            pairs = [s for _, _, s in stability_over_seeds([f[m] for f in fields])]
            if pairs:
                means = [sum(getattr(s, n) for s in pairs) / len(pairs)
                         for n in ("mean_similarity", "chance")]  # fmt: skip
                found[str(heads)].append(
                    {"similarity": rounded(means[0]), "chance": rounded(means[1])}
                )
    return found


def rounded(value: float | None) -> float | None:
    """Five digits: what a reader can use."""
    return None if value is None else float(f"{value:.5g}")


def tables(data: dict) -> dict[str, str]:
    """Markdown tables by name."""
    return {
        "runs": runs_table(data),
        "ratios": blocks_table(data, accuracy="probe accuracy", snr="SNR", snr_unclipped="SNR*"),
        "clusters": blocks_table(data, clusters="N_c", cluster_size="C_s"),
        "noise": blocks_table(data, internal_noise="n_i", external_noise="n_e"),
        "growth": growth_table(data),
        "threshold": threshold_table(data),
        "sharing": sharing_table(data),
        "committee": committee_table(data),
        "subsets": subsets_table(data),
    }


def by_heads(data: dict) -> dict[int, list[dict]]:
    """Number of heads -> its runs."""
    groups: dict[int, list[dict]] = {}
    for run in sorted(data["runs"], key=lambda run: (run["heads"], run["seed"])):
        groups.setdefault(run["heads"], []).append(run)
    return groups


def runs_table(data: dict) -> str:
    rows = [
        [heads, run["seed"], run["epochs"], percent(run["test_accuracy"]), f"{run['minutes']:.1f}"]
        for heads, runs in by_heads(data).items()
        for run in runs
    ]
    return markdown(["heads", "seed", "epochs", "test accuracy", "minutes"], rows)


def blocks_table(data: dict, **names: str) -> str:
    """Numbers by block, over the seeds; behind each the means of both null models."""
    titles, rows = ["heads", "block"], []
    for title in names.values():
        titles += [title] if title == "probe accuracy" else [title, "permuted", "random"]
    for heads, runs in by_heads(data).items():
        for m in range(len(runs[0]["blocks"])):
            blocks = [run["blocks"][m] for run in runs]
            row = [heads, m + 1]
            for name, title in names.items():
                if title == "probe accuracy":
                    row.append(over([100 * b[name] for b in blocks], " %"))
                    continue
                row.append(over([b[name] for b in blocks]))
                row += [mean([b["null"][kind][name] for b in blocks]) for kind in KINDS]
            rows.append(row)
    return markdown(titles, rows)


def growth_table(data: dict) -> str:
    titles = ["heads", "seed", "SNR by block", "first block's 95 %", "last block's 95 %",
              "SNR* by block"]  # fmt: skip
    rows = []
    for heads, runs in by_heads(data).items():
        for run in runs:
            blocks = run["blocks"]
            ends = (blocks[0]["interval"], blocks[-1]["interval"])
            by_block = [
                ", ".join(digits(b[name]) for b in blocks) for name in ("snr", "snr_unclipped")
            ]
            between = [f"{digits(low)} to {digits(high)}" for low, high in ends]
            rows.append([heads, run["seed"], by_block[0], *between, by_block[1]])
    return markdown(titles, rows)


def threshold_table(data: dict) -> str:
    thresholds = list(data["runs"][0]["blocks"][0]["sweep"])
    rows = []
    for heads, runs in by_heads(data).items():
        for m in range(len(runs[0]["blocks"])):
            cells = [over([run["blocks"][m]["sweep"][t] for run in runs]) for t in thresholds]
            rows.append([heads, m + 1, *cells])
    return markdown(["heads", "block", *(f"SNR at {t}" for t in thresholds)], rows)


def sharing_table(data: dict) -> str:
    titles = ["heads", "block", "heads per label", "labels without a head",
              "labels two heads share", "by chance",
              "likeness over seeds", "by chance"]  # fmt: skip
    rows = []
    for heads, runs in by_heads(data).items():
        alike = data["stability"][str(heads)]
        for m in range(len(runs[0]["blocks"])):
            blocks = [run["blocks"][m] for run in runs]
            row = [heads, m + 1]
            row += [over([b[n] for b in blocks]) for n in ("heads_per_label", "lost_labels")]
            row += [over([100 * b[n] for b in blocks], " %") for n in ("overlap", "chance_overlap")]
            pair = alike[m] if alike else {"similarity": None, "chance": None}
            rows.append([*row, digits(pair["similarity"]), digits(pair["chance"])])
    return markdown(titles, rows)


def committee_table(data: dict) -> str:
    rows = [
        [combination, c["what"], f"{100 * c['difference']:+.2f}",
         f"{100 * c['low']:+.2f} to {100 * c['high']:+.2f}", f"{c['p_value']:.2g}"]
        for combination, comparisons in data["committee"]["comparisons"].items()
        for c in comparisons
    ]  # fmt: skip
    return markdown(["mean of", "difference", "points", "95 % interval", "p"], rows)


def subsets_table(data: dict) -> str:
    kinds = {"all": "all subsets", "distinct": "different architectures",
             "equal": "seeds of one architecture"}  # fmt: skip
    rows = [
        [combination, s["size"], kinds[s["kind"]], s["measured"], percent(s["mean"]),
         f"{percent(s['lowest'])} to {percent(s['highest'])}"]
        for combination, sizes in data["committee"]["sizes"].items()
        for s in sizes
    ]  # fmt: skip
    titles = ["mean of", "members", "which", "committees", "mean accuracy", "lowest to highest"]
    return markdown(titles, rows)


def markdown(titles: list[str], rows: list[list]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def digits(value: float | None) -> str:
    if value is None:
        return "-"
    size = abs(value)
    return f"{value:.{2 if size < 10 else 1 if size < 100 else 0}f}"


def over(values: list[float | None], unit: str = "") -> str:
    """Mean over runs, and lowest to highest where there are several."""
    if None in values:
        return "-"
    if len(values) == 1:
        return mean(values) + unit
    return f"{mean(values)}{unit} ({digits(min(values))} to {digits(max(values))})"


def mean(values: list[float | None]) -> str:
    return "-" if None in values else digits(sum(values) / len(values))


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def fill(page: str, found: dict[str, str]) -> str:
    """The page with every table between its marks replaced."""
    for name, table in found.items():
        marks = rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)"
        page, count = re.subn(marks, lambda m, t=table: m[1] + t + m[2], page, flags=re.S)
        if count != 1:
            raise ValueError(f"{PAGE.name} has {count} places for the table {name}, expected 1")
    return page


def draw(data: dict, path: Path) -> None:
    """Curves by block: a line per run, bands of the null models' lowest to highest run."""
    from matplotlib.figure import Figure

    shown = {"accuracy": "probe accuracy", "snr": "SNR", "snr_unclipped": "SNR*",
             "external_noise": "external noise, elements per head",
             "clusters": "clusters per head", "cluster_size": "labels per cluster"}  # fmt: skip
    colors = ("#0072b2", "#d55e00", "#007a5a", "#9c4f86")
    markers, bands = (
        "os^D",
        {"labels": ("#888888", "labels permuted"), "probes": ("#e69f00", "random probes")},
    )
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for ax, (name, title) in zip(figure.subplots(2, 3).ravel(), shown.items(), strict=True):
        for number, (heads, runs) in enumerate(by_heads(data).items()):
            for run in runs:
                y = [block[name] for block in run["blocks"]]
                label = f"{heads} heads" if run is runs[0] else None
                ax.plot(range(1, len(y) + 1), y, marker=markers[number], ms=4, lw=1.2,
                        color=colors[number], label=label)  # fmt: skip
        for kind, (color, label) in bands.items() if name != "accuracy" else ():
            of_block = zip(
                *([b["null"][kind][name] for b in r["blocks"]] for r in data["runs"]), strict=True
            )
            ends = [(min(values), max(values)) for values in of_block]
            x = range(1, len(ends) + 1)
            ax.fill_between(x, *zip(*ends, strict=True), color=color, alpha=0.35, label=label)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("block", fontsize=9)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylim(bottom=None if name == "accuracy" else 0)
    lines, labels = figure.axes[1].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(lines), fontsize=9)
    figure.suptitle(f"{data['title']}: a line per run", fontsize=11)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    collecting = actions.add_parser("collect")
    collecting.add_argument("runs", type=Path, nargs="+")
    collecting.add_argument("--committee", type=Path, required=True)
    actions.add_parser("write")
    args = parser.parse_args()
    if args.action == "collect":
        JSON.write_text(json.dumps(collect(args.runs, args.committee), indent=1) + "\n")
    else:
        data = json.loads(JSON.read_text())
        PAGE.write_text(fill(PAGE.read_text(), tables(data)))
        draw(data, PICTURE)


if __name__ == "__main__":
    main()
