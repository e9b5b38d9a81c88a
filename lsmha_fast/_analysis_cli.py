"""`lsmha shp | committee | prune | report`: their flags, and the call behind them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._cli_types import not_negative, positive_float, positive_int


def add_analysis_commands(commands) -> None:
    """Register the commands."""
    add_shp(commands)
    add_committee(commands)
    add_prune(commands)
    add_report(commands)


def add_shp(commands) -> None:
    """`lsmha shp RUN`."""
    shp = commands.add_parser("shp", help="single-head performance of every head of a run")
    shp.add_argument("run_dir", type=Path, metavar="RUN", help="folder that `lsmha train` wrote")
    shp.add_argument("--weights", choices=("best", "last"), default="best", help="default: best")
    shp.add_argument("--out", type=Path, help="folder to write (default: RUN/shp)")
    shp.add_argument("--probe-epochs", type=positive_int, default=40, help="default: 40")
    shp.add_argument("--probe-lr", type=positive_float, default=1e-2, help="default: 0.01")
    shp.add_argument("--layer-norm", action="store_true", help="LayerNorm in front of the probes")
    shp.add_argument(
        "--pooling",
        choices=("head", "full"),
        default="head",
        help="pooling weights from the head alone or from all heads (default: head)",
    )
    shp.add_argument("--bias", action="store_true", help="keep the classifier's bias in the fields")
    shp.add_argument("--threshold", type=positive_float, default=0.5, help="default: 0.5")
    shp.add_argument(
        "--normalize",
        choices=("matrix", "row"),
        default="matrix",
        help="fields are divided by the largest of the matrix or of their row (default: matrix)",
    )
    text = "GiB of memory for features while the probes train (default: 2)"
    shp.add_argument("--cache-gib", type=not_negative, default=2.0, help=text)
    text = "GiB of temporary files for those that do not fit; else they are recomputed (default: 0)"
    shp.add_argument("--disk-cache-gib", type=not_negative, default=0.0, help=text)
    shp.add_argument("--no-null", action="store_true", help="leave the null models out")
    shp.add_argument("--batch-size", type=positive_int, default=256, help="default: 256")
    shp.add_argument("--data-root", help="folder of the data set, if it moved since training")
    shp.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    shp.set_defaults(run=run_shp)


def run_shp(args: argparse.Namespace) -> None:
    """Train the probes of a run, measure all heads, print and write what was found."""
    from ._shp_command import ShpOptions, shp_of_run

    options = ShpOptions(
        weights=args.weights,
        probe_epochs=args.probe_epochs,
        probe_lr=args.probe_lr,
        layer_norm=args.layer_norm,
        pooling=args.pooling,
        bias=args.bias,
        threshold=args.threshold,
        normalize=args.normalize,
        null=not args.no_null,
        cache_gib=args.cache_gib,
        disk_cache_gib=args.disk_cache_gib,
        batch_size=args.batch_size,
        data_root=args.data_root,
        device=args.device,
    )
    out = args.out or args.run_dir / "shp"
    for line in shp_of_run(args.run_dir, out, options, command=args.line):
        print(line)


def add_committee(commands) -> None:
    """`lsmha committee RUN RUN ...`."""
    about = "soft committee of several runs of one data set, and of every subset of them"
    committee = commands.add_parser("committee", help=about)
    committee.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run folders")
    committee.add_argument("--weights", choices=("best", "last"), default="best")
    where = "folder to write (default: committee beside the first RUN)"
    committee.add_argument("--out", type=Path, help=where)
    text = "bootstrap samples (default: 2000)"
    committee.add_argument("--samples", type=positive_int, default=2000, help=text)
    text = "committees of one size and kind to measure at most (default: 200)"
    committee.add_argument("--max-subsets", type=positive_int, default=200, help=text)
    committee.add_argument("--batch-size", type=positive_int, default=256, help="default: 256")
    committee.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    committee.add_argument("--data-root", help="folder of the data set, if it moved since training")
    committee.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    committee.set_defaults(run=run_committee)


def run_committee(args: argparse.Namespace) -> None:
    """Measure the committees, print and write what was found."""
    from ._committee_command import CommitteeOptions, committee_of_runs

    options = CommitteeOptions(
        weights=args.weights,
        samples=args.samples,
        max_subsets=args.max_subsets,
        batch_size=args.batch_size,
        seed=args.seed,
        data_root=args.data_root,
        device=args.device,
    )
    out = args.out or args.run_dirs[0].resolve().parent / "committee"
    for line in committee_of_runs(args.run_dirs, out, options, command=args.line):
        print(line)


def add_prune(commands) -> None:
    """`lsmha prune RUN`."""
    from ._prune_options import add_flags

    about = "remove heads, nodes or connections of a run, against random and magnitude controls"
    prune = commands.add_parser("prune", help=about)
    prune.add_argument("run_dir", type=Path, metavar="RUN", help="folder that `lsmha train` wrote")
    prune.add_argument("--out", type=Path, help="folder to write (default: RUN/prune)")
    where = "run folder of the pruned model (default: RUN-pruned)"
    prune.add_argument("--pruned-run", type=Path, metavar="DIR", help=where)
    add_flags(prune)
    prune.set_defaults(run=run_prune)


def run_prune(args: argparse.Namespace) -> None:
    """Prune, print and write what was found."""
    from ._prune_options import from_flags

    options = from_flags(args)
    from ._prune_command import prune_run

    run_dir = args.run_dir.resolve() if args.run_dir.name in ("", "..") else args.run_dir
    pruned = args.pruned_run or run_dir.with_name(run_dir.name + "-pruned")
    for line in prune_run(run_dir, args.out or run_dir / "prune", pruned, options, args.line):
        print(line)


def add_report(commands) -> None:
    """`lsmha report RUN`."""
    report = commands.add_parser("report", help="one HTML page of what was measured of a run")
    report.add_argument("run_dir", type=Path, metavar="RUN", help="run folder with its shp folder")
    report.add_argument("--shp", type=Path, help="folder of `lsmha shp` (default: RUN/shp)")
    where = "folder of `lsmha committee` (default: `committee` beside RUN, where RUN is a member)"
    report.add_argument("--committee", type=Path, help=where)
    report.add_argument("--out", type=Path, help="HTML file to write (default: RUN/report.html)")
    report.add_argument("--open", action="store_true", help="show it in the web browser")
    report.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> None:
    """Write the page, and open it if asked to."""
    from ._report_command import report_of_run

    out = args.out or args.run_dir / "report.html"
    path = report_of_run(
        args.run_dir, out, shp=args.shp, committee=args.committee, command=args.line
    )
    print(f"written: {path} ({path.stat().st_size / 1e6:.2f} MB)")
    if args.open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
