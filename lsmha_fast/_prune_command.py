"""`lsmha prune`: a run with fewer heads, nodes or connections, against controls."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from . import analysis
from ._prune_options import PruneOptions
from ._prune_workbench import Workbench, pruned_config
from ._shp_command import progress_bar
from .analysis.pruning import KeptHeads
from .analysis.pruning_report import Pruning, PruningRow
from .info import versions
from .models import CCT, prune_model
from .train.loop import write_run
from .train.run import load_run


def prune_run(
    run_dir: Path, out: Path, pruned_dir: Path, options: PruneOptions, command: str = ""
) -> Iterator[str]:
    """Prune a run; yields lines for people, writes `out` and the pruned run.

    Args:
        run_dir: what `lsmha train` wrote.
        out: folder for summary, arrays and picture.
        pruned_dir: run folder of the pruned model, new.
        options: see `PruneOptions`.
        command: what was typed, for the record.

    Raises:
        ValueError, OSError: not a run, folders that hold other things, more heads than there are.
    """
    run = load_run(run_dir, options.weights)
    analysis.check_folder(out)
    if pruned_dir.exists():
        raise ValueError(f"--pruned-run {pruned_dir} exists already; give another")
    bench = Workbench(run, options)
    if options.split == options.choice_split:
        yield f"the choice is made on {bench.choice_name}: accuracies there are not held out"
    yield f"measuring {options.criterion} on {bench.choice_name} ({len(bench.choice)} images)"
    measure = _prune_heads if options.criterion == "shp" else _prune_connections
    rows, kept, target = measure(bench, pruned_dir)
    pruning = Pruning(
        criterion=options.criterion,
        split=options.split,
        choice_split=bench.choice_name,
        rows=tuple(rows),
        kept=tuple(kept),
        target=target,
        choices=options.choices(),
        command=command,
        versions=versions(),
    )
    title = f"{bench.measured.name}, {bench.config.model}"
    files = analysis.write_pruning(out, pruning, title=title)
    yield from analysis.pruning_lines(pruning)
    yield "written:"
    yield from (f"  {path}" for path in files)
    yield f"  {pruned_dir} (a run: lsmha shp {pruned_dir})"


Measured = tuple[list[PruningRow], list[np.ndarray], int]  # the last: units gone in the saved model


def _prune_heads(bench: Workbench, pruned_dir: Path) -> Measured:
    ranking = rank(bench)
    target = target_number(bench, ranking)
    rows, kept = measure_heads(bench, ranking, target)
    if bench.options.finetune_epochs:
        rows = _finetune(bench, rows, kept, target, pruned_dir)
    else:
        _save(bench, prune_model(bench.model, heads=ranking.kept(target)), pruned_dir)
    return rows, [_flags(k, ranking) for k in kept], target


def _prune_connections(bench: Workbench, pruned_dir: Path) -> Measured:
    from ._prune_nodes import measure_connections

    rows, kept, small = measure_connections(bench)
    _save(bench, small, pruned_dir)
    chosen = (r for r in rows if r.seed is None and r.threshold == bench.options.threshold)
    return rows, kept, next(chosen).removed


def _save(bench: Workbench, model: CCT, pruned_dir: Path) -> None:
    """A finished run of a pruned model."""
    config = pruned_config(bench.config, model)
    write_run(config, pruned_dir, model, epoch=config.total_epochs)


def rank(bench: Workbench) -> analysis.HeadRanking:
    """Probes, SHP and clusters of the run, and the order of its heads."""
    options = bench.options
    probes = analysis.train_probes(
        bench.model,
        bench.batches(bench.probe_set, shuffle=True),
        epochs=options.probe_epochs,
        lr=options.probe_lr,
        device=bench.device,
        progress=progress_bar(options.probe_epochs),
    )
    chosen_on = bench.batches(bench.choice, shuffle=False)
    shp = analysis.single_head_performance(bench.model, probes, chosen_on, device=bench.device)
    clusters = [
        analysis.find_clusters(m, threshold=options.threshold, normalize=options.normalize)
        for m in shp.matrices
    ]
    return analysis.rank_heads(shp.matrices, clusters)


def target_number(bench: Workbench, ranking: analysis.HeadRanking) -> int:
    """How many heads shall go, by the option given.

    Raises:
        ValueError: more than can go.
    """
    options, most = bench.options, len(ranking.removal)
    if options.number is not None:
        ranking.kept(options.number)  # refuses what cannot go
        return options.number
    if options.fraction is not None:
        return min(round(options.fraction * sum(map(len, ranking.rounds))), most)
    if options.max_drop is None:
        return ranking.redundant(options.keep_per_label)
    before, target = bench.accuracy(bench.model, bench.choice), 0
    for number in _grid(most, options.steps):
        small = prune_model(bench.model, heads=ranking.kept(number))
        if before - bench.accuracy(small, bench.choice) > options.max_drop:
            break
        target = number
    return target


def _grid(most: int, steps: int) -> list[int]:
    """Evenly spaced numbers 1..most, `steps` of them or as many as there are."""
    return sorted({round(most * i / steps) for i in range(1, steps + 1)} - {0})


def measure_heads(
    bench: Workbench, ranking: analysis.HeadRanking, target: int
) -> tuple[list[PruningRow], list[KeptHeads]]:
    """Accuracy and cost at evenly spaced numbers of removed heads and at the target.

    The controls remove as many heads of every block as SHP does: what differs is which.
    """
    options = bench.options
    sizes = [len(r) for r in ranking.rounds]
    magnitudes = analysis.head_magnitudes(bench.model)
    before, macs = bench.accuracy(bench.model), bench.macs(bench.model)
    rows, kept_of_rows = [], []
    for removed in sorted({*_grid(len(ranking.removal), options.steps), target}):
        by_shp = ranking.kept(removed)
        counts = tuple(map(len, by_shp))
        candidates: list[tuple[str, int | None, KeptHeads]] = [
            ("shp", None, by_shp),
            ("magnitude", None, analysis.largest_heads(magnitudes, counts)),
        ]
        candidates += [
            ("random", seed, analysis.random_heads(sizes, counts, seed))
            for seed in range(options.random_seeds)
        ]
        small = prune_model(bench.model, heads=by_shp)
        ms: list[float] | list[None] = [None, None]
        if options.timing_rounds:
            ms = bench.milliseconds([bench.model, small])
        macs_after = bench.macs(small)
        for method, seed, kept in candidates:
            rows.append(
                PruningRow(
                    method=method,
                    seed=seed,
                    removed=removed,
                    total=sum(sizes),
                    kept_per_block=counts,
                    accuracy_before=before,
                    accuracy_after=bench.accuracy(prune_model(bench.model, heads=kept)),
                    accuracy_finetuned=None,
                    ms_before=ms[0],
                    ms_after=ms[1],
                    macs_before=macs,
                    macs_after=macs_after,
                    uncovered=ranking.uncovered(kept, options.keep_per_label),
                    threshold=options.threshold,
                )
            )
            kept_of_rows.append(kept)
    return rows, kept_of_rows


def _finetune(
    bench: Workbench,
    rows: Sequence[PruningRow],
    kept: Sequence[KeptHeads],
    target: int,
    pruned_dir: Path,
) -> list[PruningRow]:
    """The rows, those of the target with their accuracy after fine-tuning; SHP's run is kept."""
    done = []
    for row, heads in zip(rows, kept, strict=True):
        if row.removed == target:
            small = prune_model(bench.model, heads=heads)
            with tempfile.TemporaryDirectory() as scratch:
                folder = pruned_dir if row.method == "shp" else Path(scratch) / "run"
                row = row._replace(accuracy_finetuned=bench.finetuned(small, folder))
        done.append(row)
    return done


def _flags(kept: KeptHeads, ranking: analysis.HeadRanking) -> np.ndarray:
    """All heads, block by block: whether they are kept."""
    return np.concatenate(
        [np.isin(np.arange(len(r)), heads) for r, heads in zip(ranking.rounds, kept, strict=True)]
    )
