"""`lsmha reproduce`: a manifest of runs, then probes, SHP, committee, latency, and one page."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ._train_command import add_config_flags, given_fields
from .reproduce.manifests import PLANS, Manifest, make_manifest

PAGE = "page.md"


def add_reproduce(commands) -> None:
    """Register the command."""
    about = "run a manifest of training runs and write one page of tables"
    reproduce = commands.add_parser("reproduce", help=about)
    names = "; ".join(f"{name}: {plan.title}" for name, plan in PLANS.items())
    reproduce.add_argument("name", choices=PLANS, metavar="NAME", help=names)
    reproduce.add_argument("--out", type=Path, help="folder (default: runs/reproduce-NAME)")
    reproduce.add_argument("--seeds", type=int, help="runs of every preset, from --seed on")
    text = "share of the epochs, for rehearsals; the page says so (default: 1)"
    reproduce.add_argument("--scale", type=float, default=1.0, help=text)
    text = "runs at a time (default: one per GPU, one on a CPU)"
    reproduce.add_argument("--jobs", type=int, help=text)
    text = "epochs of the probes' training (default: 40)"
    reproduce.add_argument("--probe-epochs", type=int, default=40, help=text)
    text = "write the page from what is there; train and measure nothing"
    reproduce.add_argument("--page-only", action="store_true", help=text)
    reproduce.add_argument("--dry-run", action="store_true", help="list the runs and stop")
    add_config_flags(reproduce)
    reproduce.set_defaults(run=run_reproduce)


def run_reproduce(args: argparse.Namespace) -> None:
    """Train what is missing, measure, write the page and print it."""
    for name in ("seeds", "jobs", "probe_epochs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    manifest = make_manifest(
        args.name, seeds=args.seeds, scale=args.scale, changes=given_fields(args)
    )
    out = args.out or Path("runs") / f"reproduce-{args.name}"
    if args.dry_run:
        for run in manifest.runs:
            print(f"{run.name}: {run.config.total_epochs} epochs")
        return

    def say(line: str) -> None:
        print(line, flush=True)

    if not args.page_only:
        train_all(manifest, out, args.jobs, say)
        for line in measure(manifest, out, args.probe_epochs):
            say(line)
    missing = unfinished(manifest, out)
    page = write_results(manifest, out, missing)
    say("\n".join(["", *page, f"written: {out}/{{{PAGE},curves.png}}"]))
    if missing and not args.page_only:
        raise ValueError(f"{len(missing)} of {len(manifest.runs)} runs are not finished")


def unfinished(manifest: Manifest, out: Path) -> list[str]:
    """Names of the runs that did not come to their end."""
    from .reproduce.runner import is_finished

    return [run.name for run in manifest.runs if not is_finished(out / "runs" / run.name, run)]


def train_all(manifest: Manifest, out: Path, jobs: int | None, say: Callable[[str], None]) -> None:
    """All runs of the manifest."""
    from .reproduce.runner import execute, visible_gpus

    gpus = visible_gpus() if manifest.runs[0].config.device in ("auto", "cuda") else []
    execute(manifest.runs, out, jobs=jobs or len(gpus) or 1, gpus=gpus, say=say)


def measure(manifest: Manifest, out: Path, probe_epochs: int) -> Iterator[str]:
    """Probes and SHP of the chosen runs, latency of all, the committee; what is there is kept."""
    from ._committee_command import CommitteeOptions, committee_of_runs
    from ._shp_command import ShpOptions, shp_of_run
    from .reproduce.page import first_seeds
    from .reproduce.runner import is_finished

    config = manifest.runs[0].config
    device, root = config.device, config.data_root
    for run in first_seeds(manifest, manifest.shp):
        folder = out / "runs" / run.name
        if is_finished(folder, run) and not (folder / "shp" / "summary.json").is_file():
            yield f"{run.name}: probes and SHP"
            options = ShpOptions(probe_epochs=probe_epochs, device=device, data_root=root)
            for _ in shp_of_run(folder, folder / "shp", options):
                pass
    yield from measure_latency(manifest, out)
    folders = [
        out / "runs" / r.name for r in manifest.runs if is_finished(out / "runs" / r.name, r)
    ]
    if len(folders) > 1:
        yield f"committee of {len(folders)} runs"
        members = CommitteeOptions(device=device, data_root=root)
        for _ in committee_of_runs(folders, out / "committee", members):
            pass


def measure_latency(manifest: Manifest, out: Path) -> Iterator[str]:
    """Latency of every preset's first seed, where this version has `lsmha latency`."""
    from .reproduce.page import LATENCY_BATCHES, first_seeds
    from .reproduce.runner import is_finished

    if importlib.util.find_spec("lsmha_fast._latency_command") is None:
        return
    command = importlib.import_module("lsmha_fast._latency_command")
    options = command.LatencyOptions(batches=LATENCY_BATCHES, device=manifest.runs[0].config.device)
    for run in first_seeds(manifest, {run.preset for run in manifest.runs}):
        folder = out / "runs" / run.name
        if is_finished(folder, run) and not (folder / "latency" / "summary.json").is_file():
            yield f"{run.name}: latency"
            for _ in command.latency_of_runs([folder], options):
                pass


def write_results(manifest: Manifest, out: Path, missing: Sequence[str]) -> list[str]:
    """The page and its picture, from what lies in the folders."""
    from ._files import atomic_file
    from .reproduce.page import plot_curves, write_page
    from .reproduce.results import read_groups
    from .train.run import load_split, pick_device

    groups = read_groups(manifest, out)
    if not groups:
        raise ValueError(f"no run of {manifest.name} has finished an epoch; see {out}/logs")
    config = manifest.runs[0].config
    data = load_split(config, "test").name
    page = write_page(
        manifest,
        out,
        groups,
        data=data,
        device=_device_name(pick_device(config.device)),
        command="lsmha " + shlex.join(sys.argv[1:]),
        unfinished=missing,
    )
    with atomic_file(out / "curves.png") as part:
        plot_curves(groups, data).savefig(part, dpi=120, format="png")
    with atomic_file(out / PAGE) as part:
        part.write_text("\n".join(page))
    return page


def _device_name(device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, threads of a run: {torch.get_num_threads()}"
