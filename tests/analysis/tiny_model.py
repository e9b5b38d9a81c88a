"""A model small enough to check by hand, and its probes."""

import torch
from torch import nn

from lsmha_fast.analysis import BlockProbe, Probes


class TinyModel(nn.Module):
    """Blocks that are linear maps of the tokens; `images` are (B, N, 6) tokens already."""

    block_names = ("block 2", "block 3")

    def __init__(self, num_classes=4, shapes=((3, 4), (5, 2))):
        super().__init__()
        self.shapes = shapes
        self.maps = nn.ModuleList(nn.Linear(6, h * d) for h, d in shapes)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(6, num_classes)
        self.calls = 0

    def forward_with_heads(self, images):
        self.calls += 1
        heads = tuple(
            self.dropout(linear(images)).unflatten(-1, shape)
            for linear, shape in zip(self.maps, self.shapes, strict=True)
        )
        return self.fc(images.mean(1)), heads


def random_probes(model, layer_norm=False, num_classes=4):
    blocks = tuple(
        BlockProbe(torch.randn(h, d), torch.randn(num_classes, h, d), torch.randn(num_classes))
        for h, d in model.shapes
    )
    return Probes(blocks, model.block_names, layer_norm)


def random_batches(sizes=(7, 5, 9), num_classes=4):
    """Batches in which every class occurs."""
    return [
        (torch.randn(size, 8, 6), torch.arange(size).add(k).remainder(num_classes))
        for k, size in enumerate(sizes)
    ]
