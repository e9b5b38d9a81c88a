"""`lsmha shp`: from a run folder to probes, the SHP of every head, and pictures of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from . import analysis
from .data import Batches, ImageDataset, normalize
from .info import versions
from .train.run import load_run, load_split, pick_device


@dataclass(frozen=True)
class ShpOptions:
    """Choices of `lsmha shp`; those of the method are explained in docs/shp.md."""

    weights: str = "best"
    probe_epochs: int = 40
    probe_lr: float = 1e-2
    layer_norm: bool = False
    pooling: str = "head"
    bias: bool = False
    threshold: float = 0.5
    normalize: str = "matrix"
    null: bool = True
    cache_gib: float = 2.0
    disk_cache_gib: float = 0.0
    batch_size: int = 256
    data_root: str | None = None
    device: str = "auto"


class NormalizedBatches:
    """Batches of (float images, labels) in one fixed order, as often as one likes."""

    def __init__(self, dataset: ImageDataset, batch_size: int, device, *, shuffle: bool):
        self.mean, self.std = dataset.mean, dataset.std
        self.batches = Batches(dataset, batch_size, shuffle=shuffle, device=device)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            yield normalize(images, self.mean, self.std), labels


def shp_of_run(
    run_dir: Path, out: Path, options: ShpOptions, *, command: str | None = None
) -> Iterator[str]:
    """Measure every head of a run; yields lines for people to read and writes `out`.

    Probes are trained on the training split, everything else is measured on the test split.

    Args:
        run_dir: what `lsmha train` wrote.
        out: folder for arrays, summary and pictures.
        options: see `ShpOptions`.
        command: the command line that asked for it, kept in the summary.

    Raises:
        ValueError, OSError: not a run, damaged files, or a folder that holds other things.
    """
    run = load_run(run_dir, options.weights)
    analysis.check_folder(out)
    config = run.config
    if options.data_root is not None:
        config = replace(config, data_root=options.data_root)
    device = pick_device(options.device)
    train_set, test_set = load_split(config, "train"), load_split(config, "test")
    train = NormalizedBatches(train_set, options.batch_size, device, shuffle=True)
    test = NormalizedBatches(test_set, options.batch_size, device, shuffle=False)

    yield f"training the probes of {len(run.model.block_names)} blocks on {train_set.name}"
    probes = analysis.train_probes(
        run.model,
        train,
        val_batches=test,
        epochs=options.probe_epochs,
        lr=options.probe_lr,
        layer_norm=options.layer_norm,
        cache_bytes=int(options.cache_gib * 2**30),
        disk_bytes=int(options.disk_cache_gib * 2**30),
        device=device,
        progress=progress_bar(options.probe_epochs),
    )
    shp = analysis.single_head_performance(
        run.model,
        probes,
        test,
        pooling=options.pooling,
        bias=options.bias,
        class_names=test_set.class_names,
        device=device,
    )
    null = None
    if options.null:
        yield "measuring the null models: permuted labels, random probes"
        null = analysis.measure_null(
            run.model, probes, test, pooling=options.pooling, bias=options.bias, device=device
        )
    found = [
        analysis.find_clusters(m, threshold=options.threshold, normalize=options.normalize)
        for m in shp.matrices
    ]
    snrs = [analysis.signal_to_noise(m, c) for m, c in zip(shp.matrices, found, strict=True)]
    details = analysis.measure_details(shp, found, null=null)
    title = f"{test_set.name}, {config.model}"
    origin = {"command": command, "weights": options.weights, "versions": versions()}
    files = analysis.write_report(
        out, probes, shp, found, snrs, details, title=title, origin=origin
    )

    yield f"single-head performance on {len(test_set)} test images of {test_set.name}"
    yield from analysis.summarize(probes, shp, found, snrs, details, max_heads=16)
    yield "written:"
    yield from (f"  {path}" for path in files)


def progress_bar(epochs: int):
    """A callback for `train_probes` that moves a bar, silent off a terminal."""
    from tqdm import tqdm

    bar = tqdm(total=epochs, desc="probes", disable=None, leave=False)

    def advance(done: int, of: int, loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update(done - bar.n)
        if done == of:
            bar.close()

    return advance
