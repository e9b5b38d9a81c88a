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

from ._analysis_cli import add_analysis_commands
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
    add_analysis_commands(commands)
    add_data(commands)
    add_deploy_commands(commands)
    info = commands.add_parser("info", help="versions and backends, and why one is missing")
    info.set_defaults(run=lambda args: run_info())
    return parser


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
