"""`lsmha prune --criterion andc | afcc`: nodes and connections of a run, against controls."""

from __future__ import annotations

import numpy as np

from ._prune_options import PruneOptions
from ._prune_workbench import Workbench
from ._shp_command import progress_bar
from .analysis import connections
from .analysis.connections import Masks
from .analysis.pruning_report import PruningRow
from .analysis.sweep import THRESHOLDS
from .models import CCT, drop_silent

RULES = {"afcc": connections.afcc_masks, "andc": connections.andc_masks}


def measure_connections(bench: Workbench) -> tuple[list[PruningRow], list[np.ndarray], CCT]:
    """Rows and masks of every threshold and control, and the model pruned at the chosen one.

    Whatever falls silent is removed from the model, which is then measured; other connections are
    zero in dense matrices and save no time.
    """
    options = bench.options
    snp = connections.measure_nodes(
        bench.model,
        bench.batches(bench.probe_set, shuffle=True),
        bench.batches(bench.choice, shuffle=False),
        epochs=options.probe_epochs,
        lr=options.probe_lr,
        device=bench.device,
        progress=progress_bar(options.probe_epochs),
    )
    before, macs = bench.accuracy(bench.model), bench.macs(bench.model)
    rows, kept = [], []
    for threshold in sorted({*THRESHOLDS, options.threshold}):
        recognized = connections.recognized_labels(
            snp, threshold=threshold, normalize=options.normalize
        )
        masks = RULES[options.criterion](bench.model, recognized)
        if threshold == options.threshold:
            chosen = drop_silent(connections.masked_model(bench.model, masks))
        for method, seed, some in _candidates(bench.model, masks, options):
            masked = connections.masked_model(bench.model, some)
            small = drop_silent(masked)
            ms = bench.milliseconds([bench.model, small]) if options.timing_rounds else [None, None]
            rows.append(
                PruningRow(
                    method=method,
                    seed=seed,
                    removed=sum(int((~m).sum()) for m in some.values()),
                    total=sum(m.numel() for m in some.values()),
                    kept_per_block=_per_block(some),
                    accuracy_before=before,
                    accuracy_after=bench.accuracy(masked),
                    accuracy_finetuned=None,
                    ms_before=ms[0],
                    ms_after=ms[1],
                    macs_before=macs,
                    macs_after=bench.macs(small) - _zero_macs(small, some),
                    uncovered=None,
                    threshold=threshold,
                )
            )
            kept.append(np.concatenate([m.flatten().numpy() for m in some.values()]))
    return rows, kept, chosen


def _candidates(
    model: CCT, masks: Masks, options: PruneOptions
) -> list[tuple[str, int | None, Masks]]:
    controls: list[tuple[str, int | None]] = [("magnitude", None)]
    controls += [("random", seed) for seed in range(options.random_seeds)]
    return [
        (options.criterion, None, masks),
        *((name, seed, connections.control_masks(model, masks, seed)) for name, seed in controls),
    ]


def _per_block(masks: Masks) -> tuple[int, ...]:
    """Connections kept, by block; those of the classifier, where it is pruned, come last."""
    counts: dict[str, int] = {}
    for name in sorted(masks, key=lambda name: name.startswith("fc.")):
        block = ".".join(name.split(".")[:2])
        counts[block] = counts.get(block, 0) + int(masks[name].sum())
    return tuple(counts.values())


def _zero_macs(model: CCT, masks: Masks) -> int:
    """Multiply-adds of one image with connections of `masks` that are zero in `model`."""
    tokens = model.grid[0] * model.grid[1]
    return sum(
        int((model.get_parameter(name) == 0).sum()) * (1 if name.startswith("fc.") else tokens)
        for name in masks
    )
