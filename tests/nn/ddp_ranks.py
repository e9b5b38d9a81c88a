"""Two gloo processes on the CPU: DDP and FSDP2 with LSMultiHeadAttention. Run by the test."""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lsmha_fast import EncoderBlock, LSMultiHeadAttention

WORLD = 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = EncoderBlock(16, 4)
        self.attn = LSMultiHeadAttention(16, 8, batch_first=True)

    def forward(self, x):
        x = self.block(x)
        return self.attn(x, x, x)[0].square().mean()


def gradients(model, x):
    model.zero_grad()
    model(x).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def rank_main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(2 * WORLD, 6, 16).double()
    expected = gradients(model, x)  # one process, the whole batch
    share = x[2 * rank : 2 * rank + 2]

    for static_graph in (False, True):
        parallel = DistributedDataParallel(copy.deepcopy(model), static_graph=static_graph)
        for name, grad in gradients(parallel, share).items():
            torch.testing.assert_close(grad, expected[name.removeprefix("module.")])

    sharded = copy.deepcopy(model)
    mesh = torch.distributed.init_device_mesh("cpu", (WORLD,))
    for layer in (sharded.block, sharded.attn, sharded):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    for name, grad in gradients(sharded, share).items():
        torch.testing.assert_close(grad.full_tensor(), expected[name])
    optimizer.step()
    with torch.no_grad():
        for p, grad in zip(model.parameters(), expected.values(), strict=True):
            p -= 0.1 * grad
    torch.testing.assert_close(sharded(x), model(x))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (sys.argv[1],), nprocs=WORLD)
    print("equal")
