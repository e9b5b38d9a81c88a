"""SHP of one data set measured by several processes, or in several sittings, to the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Sized
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._features import Batches, frozen, head_batches, model_device, reiterable
from ._io import load_npz, save_npz
from .probes import Probes
from .shp import GROUP, SHP, HeadSums, add_shp

_KIND = "lsmha_fast.shard/1"


def measure_shards(
    model: nn.Module,
    probes: Probes,
    batches: Batches,
    folder: str | Path,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    pooling: str = "head",
    bias: bool = False,
    class_names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> list[Path]:
    """Measure this process's share of the SHP sums and save every shard of it.

    A shard is `GROUP` batches that follow each other, whoever measures it; process r of w takes
    the shards r, r + w, ... A shard that lies in the folder already is not measured again, so an
    interrupted call is resumed by repeating it. `merge_shards` adds the shards in their order:
    the same bits for any number of processes, and those of `single_head_performance`.

    Args:
        model, probes, pooling, bias, class_names, device, backend: as for
            `single_head_performance`, the same in all processes.
        batches: has a length and gives the same batches in the same order in every process.
        folder: for the shards, seen by all processes.
        rank, world_size: this process and their number; by default those of torch.distributed
            where it is initialised, else 0 of 1. Under torch.distributed all wait for the last.

    Returns:
        The files of this process's shards.

    Raises:
        ValueError: batches without a length or with a wrong one, a rank outside 0..world_size - 1,
            a folder with shards of another measurement, damaged shards, and what
            `single_head_performance` refuses.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank is None or world_size is None:
        rank = torch.distributed.get_rank() if together else 0
        world_size = torch.distributed.get_world_size() if together else 1
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
    reiterable(batches, "batches")
    if not isinstance(batches, Sized):
        raise ValueError(f"shards need batches with a length, {type(batches).__name__} has none")
    count = len(batches)
    device = model_device(model, device)
    sums = HeadSums(probes, pooling, bias, class_names, device, backend)
    shards = -(-count // GROUP)
    info = {
        "kind": _KIND,
        "model": _digest(model.state_dict()),
        "probes": _probes_digest(probes),
        "batches": count,
        "shards": shards,
        "pooling": pooling,
        "bias": bias,
        "class_names": list(sums.names),
    }
    own = {n: _path(folder, n, shards) for n in range(rank, shards, world_size)}
    _check_others(Path(folder), info)
    missing = {n: path for n, path in own.items() if not path.is_file()}
    if missing:
        with frozen(model, device), torch.no_grad():
            _measure(model, batches, device, sums, missing, info)
    if together:
        torch.distributed.barrier()
    return list(own.values())


def merge_shards(folder: str | Path, probes: Probes) -> SHP:
    """Add up all shards of a folder, in their order.

    Args:
        folder: what `measure_shards` filled.
        probes: those of the measurement.

    Returns:
        What `single_head_performance` gives, to the bit.

    Raises:
        FileNotFoundError: there is no shard.
        ValueError: shards are missing, damaged, of different measurements or of other probes.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("shard-*.npz"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no shards")
    _, first = load_npz(paths[0], _KIND)
    expected = [_path(folder, n, first["shards"]) for n in range(first["shards"])]
    absent = [path.name for path in expected if path not in paths]
    if absent:
        raise ValueError(f"{folder} misses {len(absent)} of {len(expected)} shards: {absent[0]}")
    if first["probes"] != _probes_digest(probes):
        raise ValueError(f"{folder} was measured with other probes")
    _check_others(folder, first)
    return reduce(add_shp, (_load(path, n, probes) for n, path in enumerate(expected)))


def _measure(
    model: nn.Module,
    batches: Batches,
    device: torch.device,
    sums: HeadSums,
    missing: Mapping[int, Path],
    info: Mapping[str, Any],
) -> None:
    """Run the model over the batches of the missing shards and pass over the others."""
    iterator, seen = iter(batches), 0
    for n in range(info["shards"]):
        group = list(islice(iterator, GROUP)) if n in missing else None
        if group is None:
            seen += sum(1 for _ in islice(iterator, GROUP))
            continue
        seen += len(group)
        for batch in head_batches(model, group, device):
            sums.add(batch)
        if seen < min((n + 1) * GROUP, info["batches"]):
            break
        shard = sums.take()
        arrays = {f"sums.{m}": s.numpy() for m, s in enumerate(shard.sums)}
        save_npz(missing[n], {"counts": shard.counts.numpy(), **arrays}, {**info, "shard": n})
    if seen != info["batches"] or next(iterator, None) is not None:
        given = seen if seen < info["batches"] else "more"
        raise ValueError(f"batches say they are {info['batches']} but give {given}")


def _load(path: Path, number: int, probes: Probes) -> SHP:
    arrays, info = load_npz(path, _KIND)
    if info.get("shard") != number:
        raise ValueError(f"{path}: holds shard {info.get('shard')}, expected {number}")
    shapes: dict[str, tuple[int, ...]] = {"counts": (probes.num_classes,)}
    shapes |= {f"sums.{m}": tuple(p.fc_weight.shape) for m, p in enumerate(probes.blocks)}
    found = {name: array.shape for name, array in arrays.items()}
    if found != shapes:
        raise ValueError(f"{path}: holds arrays {found}, expected {shapes}")
    return SHP(
        tuple(torch.from_numpy(arrays[f"sums.{m}"]) for m in range(len(probes.blocks))),
        torch.from_numpy(arrays["counts"]),
        tuple(p.fc_weight for p in probes.blocks),
        tuple(p.fc_bias for p in probes.blocks),
        probes.block_names,
        tuple(info["class_names"]),
        info["pooling"],
        info["bias"],
        probes.layer_norm,
    )


def _check_others(folder: Path, info: Mapping[str, Any]) -> None:
    """Refuse a folder whose shards are not all of the measurement that `info` describes."""
    for path in sorted(folder.glob("shard-*.npz")):
        _, found = load_npz(path, _KIND)
        other = [name for name in info if name != "shard" and found.get(name) != info[name]]
        if other:
            raise ValueError(
                f"{path} is of another measurement: its {', '.join(other)} differ; "
                "name another folder or remove the old shards"
            )


def _path(folder: str | Path, number: int, shards: int) -> Path:
    return Path(folder) / f"shard-{number:05d}-of-{shards:05d}.npz"


def _probes_digest(probes: Probes) -> str:
    tensors = {
        f"{m}.{name}": t for m, p in enumerate(probes.blocks) for name, t in p._asdict().items()
    }
    return _digest(tensors, [probes.layer_norm, list(probes.block_names)])


def _digest(tensors: Mapping[str, Tensor], more: object = None) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(more).encode())
    for name, t in tensors.items():
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        flat = t.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
