"""A config and a data set small enough to train in a moment."""

import torch

from lsmha_fast.data import ImageDataset
from lsmha_fast.train import TrainConfig

TINY = TrainConfig(
    model="cct_2_3x2_32", num_heads=16, epochs=3, batch_size=16, lr=1e-3, warmup_epochs=1
)


def stripes(split):
    """Three easy labels: stripes across, stripes down, plain; 48 images of noise and signal."""
    generator = torch.Generator().manual_seed({"train": 0, "test": 1}[split])
    labels = torch.arange(48) % 3
    images = torch.randint(0, 60, (48, 3, 32, 32), generator=generator)
    images[labels == 0, :, ::4] += 180
    images[labels == 1, :, :, ::4] += 180
    return ImageDataset(
        images=images.to(torch.uint8),
        labels=labels,
        class_names=("across", "down", "plain"),
        mean=(0.3, 0.3, 0.3),
        std=(0.2, 0.2, 0.2),
        name="stripes",
        generated=True,
    )


def load(name, split, root=None, **options):
    """Stands in for `load_dataset`."""
    return stripes(split)
