"""`lsmha`: one subcommand is one function of the layers below. Heavy imports stay inside.

argparse rather than a larger library: it is there with the runtime dependencies alone, starts in
20 ms, and its errors can be one line.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from ._deploy_cli import add_deploy_commands
from ._reproduce_command import add_reproduce
from ._train_command import add_train
from ._version import __version__
from .train.config import TIERS

DATASETS = ("digits", "glyphs100", "cifar100")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run `lsmha`; returns the exit code: 0 done, 1 in part, 2 bad input, 130 interrupted."""
    args = make_parser().parse_args(argv)
    args.line = shlex.join(["lsmha", *(sys.argv[1:] if argv is None else argv)])
    warnings.showwarning = print_warning
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("LSMHA_DEBUG") == "1" or not is_bad_input(error):
            raise
        line = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            line += "; pip install 'lsmha_fast[train,data,report]' has all that the commands need"
        print(f"lsmha {args.command}: error: {line}", file=sys.stderr)
        return 2


def print_warning(message: Warning | str, *where: object, **options: object) -> None:
    """A warning as one line for people, without the line of code it came from."""
    print(f"lsmha: warning: {message}", file=sys.stderr)


def is_bad_input(error: Exception) -> bool:
    """Whether the user, not the program, is at fault."""
    if isinstance(error, (ValueError, OSError, ModuleNotFoundError)):
        return True
    # without torch none of its errors can have been raised
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    from .ops._dispatch import BackendError

    return isinstance(error, (BackendError, torch.OutOfMemoryError))


def make_parser() -> Parser:
    """The parser of `lsmha` and all its subcommands."""
    about = "Vision transformers with very many heads: train them, measure every head."
    parser = Parser(prog="lsmha", description=about)
    parser.add_argument("--version", action="version", version=f"lsmha_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_train(commands)
    add_reproduce(commands)
    add_shp(commands)
    add_committee(commands)
    add_prune(commands)
    add_report(commands)
    add_data(commands)
    add_deploy_commands(commands, positive_int, positive_float)
    info = commands.add_parser("info", help="versions and backends, and why one is missing")
    info.set_defaults(run=lambda args: run_info())
    return parser


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


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0 and finite, got {text}")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


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
    command = shlex.join(["lsmha", *sys.argv[1:]])
    for line in prune_run(run_dir, args.out or run_dir / "prune", pruned, options, command):
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


def add_data(commands) -> None:
    """`lsmha data fetch | verify | show`."""
    data = commands.add_parser("data", help="fetch, verify or look at a data set")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="download CIFAR-100 (binary archive, hash-checked)")
    fetch.add_argument("name", choices=("cifar100",))
    fetch.add_argument("--data-root", type=Path, required=True)
    verify = actions.add_parser("verify", help="check the files of a data set")
    show = actions.add_parser("show", help="write a picture of samples")
    show.add_argument("--out", type=Path, required=True, help="PNG to write")
    show.add_argument("--split", choices=("train", "test"), default="train")
    for action in (verify, show):
        action.add_argument("name", choices=DATASETS)
        action.add_argument("--data-root", type=Path)
        action.add_argument("--tier", choices=TIERS, default="easy", help="of glyphs100")
    verify.add_argument(
        "--allow-unverified", action="store_true", help="accept files with unknown hashes"
    )
    data.set_defaults(run=run_data)


def run_data(args: argparse.Namespace) -> None:
    """Run one of the data actions."""
    from . import data

    if args.action == "fetch":
        print(f"written: {data.fetch_cifar100(args.data_root)}")
        return
    tier = {"tier": args.tier} if args.name == "glyphs100" else {}
    if args.action == "verify":
        for line in data.verify(
            args.name, args.data_root, allow_unverified=args.allow_unverified, **tier
        ):
            print(line)
        return
    dataset = data.load_dataset(args.name, args.split, args.data_root, **tier)
    data.contact_sheet(dataset, args.out)
    print(f"written: {args.out}")


def run_info() -> None:
    """Print versions and backends."""
    from .info import info_lines

    print("\n".join(info_lines()))


if __name__ == "__main__":
    sys.exit(main())
