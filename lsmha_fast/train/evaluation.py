"""Loss and accuracy over a split."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Batches, ImageDataset, normalize
from .distributed import Peers
from .optim import autocast


class Stopped(Exception):
    """Somebody asked for a stop in the middle of an evaluation."""


class Evaluation(NamedTuple):
    """Mean cross entropy and accuracy over a split."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    stats: ImageDataset,
    amp_dtype: torch.dtype | None = None,
    *,
    predict: Callable[[Tensor], Tensor] | None = None,
    peers: Peers | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Loss and accuracy of `model` in eval mode over all batches.

    Args:
        model: images (B, 3, H, W) -> logits (B, K).
        batches: uint8 images and labels, on the model's device.
        stats: the data set whose mean and std normalise the images.
        amp_dtype: autocast dtype, or None.
        predict: normalised images to logits in fp32, in place of the call of `model`.
        peers: the processes that share the batches.
        stop: asked before every batch; True gives up.

    Raises:
        Stopped: `stop` said so.
    """
    peers = peers or Peers()
    predict = predict or functools.partial(logits_of, model, amp_dtype)
    model.eval()
    peers.same_buffers(model)
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, correct
    for i, (images, labels) in enumerate(batches):
        if stop():
            raise Stopped
        if i % peers.world_size != peers.rank:
            continue
        logits = predict(normalize(images, stats.mean, stats.std))
        correct = (logits.argmax(1) == labels).sum()
        sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), correct])
    loss, correct = (peers.sum(sums) / batches.num_images).tolist()
    return Evaluation(loss, correct)


@torch.no_grad()
def logits_of(model: nn.Module, amp_dtype: torch.dtype | None, images: Tensor) -> Tensor:
    """Logits (B, K) in fp32 of normalised images (B, C, H, W)."""
    with autocast(images.device, amp_dtype):
        return model(images).float()
