"""Training batches by the name of a pipeline."""

from __future__ import annotations

import torch

from .augment_config import AugmentConfig, default_config
from .dataset import ImageDataset
from .device_batches import DeviceBatches
from .errors import DatasetError
from .light_batches import LightBatches
from .timm_batches import TimmBatches
from .training_batches import Target, TrainingBatches

PIPELINES = ("device", "recipe", "light")


def make_batches(
    dataset: ImageDataset,
    *,
    batch_size: int,
    pipeline: str = "device",
    config: AugmentConfig | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    drop_last: bool = True,
) -> TrainingBatches:
    """Augmented, mixed and normalised training batches.

    `make_batches(...).epoch(e, start=s)` gives (images (b, C, H, W), soft targets (b, K) fp32) of
    step s and all later ones of epoch e; any step of any epoch can be computed at any time.

    Args:
        dataset: the training split.
        batch_size: images of an optimiser step, over all ranks; with several ranks a multiple of
            2 * world_size.
        pipeline: "device": the data set lies on the device, batched kernels; the same images
            whatever the order, the batch size and the number of ranks. "recipe": timm itself.
            "light": crop with padding and flip instead of resized crop and RandAugment.
        config: by default `default_config` for the data set.
        seed: of order, augmentation and mixing.
        device: where the batches are.
        dtype: of the images.
        rank: which part of each step.
        world_size: in how many parts.
        workers: processes of "recipe"; the other pipelines have none.
        drop_last: leave out a last step that is not full, as timm does in training.

    Returns:
        The batches, epoch by epoch.

    Raises:
        DatasetError: an unknown pipeline, numbers that do not fit, "recipe" without timm.
    """
    if pipeline not in PIPELINES:
        raise DatasetError(f"pipeline must be one of {', '.join(PIPELINES)}, got {pipeline!r}")
    if workers < 0 or (workers and pipeline != "recipe"):
        raise DatasetError(
            f"workers must be >= 0, and 0 for the pipeline {pipeline!r}, got {workers}"
            if pipeline != "recipe"
            else f"workers must be >= 0, got {workers}"
        )
    config = default_config(dataset.name) if config is None else config
    target = Target(torch.device(device), dtype, rank, world_size)
    if pipeline == "recipe":
        return TimmBatches(dataset, config, batch_size, seed, target, drop_last, workers)
    kind = DeviceBatches if pipeline == "device" else LightBatches
    return kind(dataset, config, batch_size, seed, target, drop_last)
