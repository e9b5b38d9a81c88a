"""`lsmha prune`: heads that others make superfluous, against random and magnitude controls."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from . import analysis
from ._prune_options import PruneOptions
from ._shp_command import NormalizedBatches, progress_bar
from ._version import __version__
from .analysis.cost import count_macs, interleaved_medians
from .analysis.pruning import KeptHeads
from .analysis.pruning_report import Pruning, PruningRow
from .data import Batches, ImageDataset, normalize
from .models import CCT, prune_model
from .nn import EncoderBlock
from .train.config import TrainConfig
from .train.loop import evaluate, train, write_run
from .train.run import Run, load_run, load_split, pick_device

# one training image in so many is kept from the probes, to measure SHP on
HELD_OUT = 5


class Workbench:
    """A run with the images to choose on and those to measure on, and what is measured there."""

    def __init__(self, run: Run, options: PruneOptions):
        self.options, self.model = options, run.model
        self.config = run.config
        if options.data_root is not None:
            self.config = replace(self.config, data_root=options.data_root)
        self.device = pick_device(options.device)
        self.config = replace(self.config, device=str(self.device))
        self.model.to(self.device)
        self.train_set = load_split(self.config, "train")
        self.test_set = load_split(self.config, "test")
        sets = {"train": self.train_set, "test": self.test_set}
        self.measured = sets[options.split]
        if options.choice_split == "train":
            held = torch.arange(len(self.train_set)) % HELD_OUT == 0
            self.probe_set, self.choice = (_part(self.train_set, part) for part in (~held, held))
            self.choice_name = f"every {HELD_OUT}th image of train"
        else:
            self.probe_set, self.choice = self.train_set, self.test_set
            self.choice_name = "test"

    def batches(self, dataset: ImageDataset, *, shuffle: bool) -> NormalizedBatches:
        """Normalised batches on the device."""
        return NormalizedBatches(dataset, self.options.batch_size, self.device, shuffle=shuffle)

    def accuracy(self, model: CCT, dataset: ImageDataset | None = None) -> float:
        """Of a model on the measured split, or on another data set."""
        dataset = self.measured if dataset is None else dataset
        batches = Batches(dataset, self.options.batch_size, device=self.device)
        return evaluate(model, batches, dataset).accuracy

    def macs(self, model: CCT) -> int:
        """Of one image."""
        return count_macs(model, self._images(1))

    @torch.no_grad()
    def milliseconds(self, models: Sequence[CCT]) -> list[float]:
        """Median of one batch for every model, the models taking turns."""
        images = self._images(self.options.timing_batch)
        calls = [lambda m=m.eval(): m(images) for m in models]  # type: ignore[misc]
        seconds = interleaved_medians(calls, rounds=self.options.timing_rounds, device=self.device)
        return [1000 * s for s in seconds]

    def finetuned(self, model: CCT, folder: Path) -> float:
        """Train a pruned model in a new run folder; its accuracy on the measured split after."""
        config = finetune_config(pruned_config(self.config, model), self.options)
        write_run(config, folder, model, epoch=0)
        train(config, folder, resume=True)
        return self.accuracy(load_run(folder, "last").model.to(self.device))

    def _images(self, count: int) -> torch.Tensor:
        some = self.measured.images[torch.arange(count) % len(self.measured)].to(self.device)
        return normalize(some, self.measured.mean, self.measured.std)


def prune_run(
    run_dir: Path, out: Path, pruned_dir: Path, options: PruneOptions, command: str = ""
) -> Iterator[str]:
    """Prune the heads of a run; yields lines for people, writes `out` and the pruned run.

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
        yield f"the heads are chosen on {bench.choice_name}: accuracies there are not held out"
    yield f"measuring the heads on {bench.choice_name} ({len(bench.choice)} images)"
    ranking = rank(bench)
    target = target_number(bench, ranking)
    yield f"pruning {target} of {sum(map(len, ranking.rounds))} heads, and sweeping"
    rows, kept = measure_heads(bench, ranking, target)
    small = prune_model(bench.model, heads=ranking.kept(target))
    if options.finetune_epochs:
        yield f"fine-tuning what was pruned, epochs: {options.finetune_epochs}, the controls too"
        rows = _finetune(bench, rows, kept, target, pruned_dir)
    else:
        config = pruned_config(bench.config, small)
        write_run(config, pruned_dir, small, epoch=config.epochs)
    pruning = Pruning(
        criterion="shp",
        split=options.split,
        choice_split=bench.choice_name,
        rows=tuple(rows),
        kept=tuple(_flags(k, ranking) for k in kept),
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


def pruned_config(config: TrainConfig, model: CCT) -> TrainConfig:
    """The config whose `build_model` makes a model of the same sizes as `model`."""
    blocks = [block for block in model.blocks if isinstance(block, EncoderBlock)]
    return replace(
        config,
        num_heads=tuple(b.self_attn.num_heads for b in blocks),
        head_dim=tuple(b.self_attn.head_dim for b in blocks),
        mlp_hidden=tuple(b.linear1.out_features for b in blocks),
    )


def finetune_config(config: TrainConfig, options: PruneOptions) -> TrainConfig:
    """The run's recipe, shorter, from a tenth of its learning rate, without warm-up."""
    lr = config.lr / 10 if options.finetune_lr is None else options.finetune_lr
    return replace(
        config,
        epochs=options.finetune_epochs,
        lr=lr,
        min_lr=min(config.min_lr, lr),
        warmup_epochs=0.0,
    )


def versions() -> dict[str, str]:
    """By package, for the record."""
    return {
        "lsmha_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _flags(kept: KeptHeads, ranking: analysis.HeadRanking) -> np.ndarray:
    """All heads, block by block: whether they are kept."""
    return np.concatenate(
        [np.isin(np.arange(len(r)), heads) for r, heads in zip(ranking.rounds, kept, strict=True)]
    )


def _part(dataset: ImageDataset, which: torch.Tensor) -> ImageDataset:
    coarse = dataset.coarse_labels
    return replace(
        dataset,
        images=dataset.images[which],
        labels=dataset.labels[which],
        coarse_labels=None if coarse is None else coarse[which],
    )
