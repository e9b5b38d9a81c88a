"""One run on several processes: torchrun starts them, gloo (CPU) or NCCL (GPU) connects them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .config import TrainConfig


@dataclass(frozen=True)
class Peers:
    """This process among those of a run; alone, every exchange is the identity.

    Attributes:
        rank: number of this process.
        world_size: number of processes.
        local_rank: number of this process on its machine, which is its GPU.
        control: gloo group for flags and names, which never waits for a GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The GPU of this process where the run is on GPUs."""
        if self.world_size == 1 or device.type != "cuda":
            return device
        return torch.device("cuda", self.local_rank)

    def share_norms(self, model: nn.Module, device: torch.device) -> None:
        """Make BatchNorms use the statistics of all GPUs; the CPU has no such layer."""
        if self.world_size > 1 and device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with gradients averaged over all processes in backward."""
        if self.world_size == 1:
            return model
        ids = [device.index] if device.type == "cuda" else None
        # static graph: the pooling's bias never gets a gradient
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, static_graph=True)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor added over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Tensor) -> Tensor:
        """The scalars of all processes, (world_size,)."""
        values = value.new_zeros(self.world_size)
        values[self.rank] = value
        return self.sum(values)

    def scatter(self, values: Tensor) -> Tensor:
        """This process's scalar of those of `gather`, or a share if their number has changed."""
        if len(values) == self.world_size:
            return values[self.rank]
        return values.sum() if self.is_main else values.sum() * 0

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Which flags are up in any process; all processes must ask."""
        if self.world_size == 1:
            return flags
        raised = torch.tensor([float(flag) for flag in flags])
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.control)
        return tuple(value > 0 for value in raised.tolist())

    def share(self, value: Any) -> Any:
        """The value of rank 0, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.control)
        return box[0]

    def same_buffers(self, model: nn.Module) -> None:
        """Give every process the running statistics of rank 0."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextlib.contextmanager
def joined(config: TrainConfig) -> Iterator[Peers]:
    """The processes that torchrun started, connected while the block lasts; else this one alone."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Peers()
        return
    on_gpu = config.device.startswith("cuda") or (
        config.device == "auto" and torch.cuda.is_available()
    )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu:
        torch.cuda.set_device(local_rank)
    ours = not dist.is_initialized()  # else the caller's, who may train several runs in it
    if ours:
        # after a restart the store still holds the addresses of processes that are gone
        store, rank, world_size = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"lsmha_fast/{attempt}", store)
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        control = dist.new_group(backend="gloo")
        yield Peers(dist.get_rank(), world_size, local_rank, control)
    finally:
        if ours:
            dist.destroy_process_group()
