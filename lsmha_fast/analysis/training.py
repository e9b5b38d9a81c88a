"""Training of the probes: all blocks at once, on features that are read once or in every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._features import (
    Batches,
    CachedHeads,
    block_names,
    frozen,
    head_batches,
    model_device,
    reiterable,
)
from .probes import BlockProbe, Probes, evaluate_probes, normalized, pool_all


def train_probes(
    model: nn.Module,
    batches: Batches,
    *,
    val_batches: Batches | None = None,
    epochs: int = 30,
    lr: float = 1e-2,
    weight_decay: float = 1e-2,
    layer_norm: bool = False,
    feature_dtype: torch.dtype = torch.float16,
    cache_bytes: int = 2 << 30,
    disk_bytes: int = 0,
    disk_folder: str | Path | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    backend: str | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Probes:
    """Train one probe per transformer block of a frozen model, all blocks together.

    A probe is sequence pooling (one softmax over tokens from all channels) and a linear layer on
    the concatenated outputs of the heads, before the output projection; see docs/shp.md. It is
    trained by AdamW with a cosine schedule on cross entropy, in coordinates where
    the tokens' channels have mean 0 and deviation 1, and handed back in the model's own.

    Args:
        model: has `forward_with_heads(images) -> (logits (B, K), heads per block (B, N, H, D))`.
            It is moved to `device`, run in evaluation mode, and its modes are restored.
        batches: training (images, labels) batches in an order that mixes the labels; iterated
            once per epoch, or once in all if the features fit into `cache_bytes + disk_bytes`.
        val_batches: batches to measure the accuracy on; None measures none.
        epochs: passes over the training features.
        lr: highest learning rate.
        weight_decay: AdamW's, on all weights, not on the biases.
        layer_norm: normalise each token over all channels first, without affine part.
        feature_dtype: the features are rounded to this dtype, stored or not.
        cache_bytes: memory for stored features, in bytes.
        disk_bytes: bytes of temporary files for those that do not fit; features that fit into
            neither are recomputed in every epoch.
        disk_folder: where these files go; by default where temporary files do.
        device: where to work; by default where the model is.
        seed: of the initial weights, the only random part.
        backend: of `ops.seq_pool`.
        progress: called after each epoch with (epochs done, epochs, mean loss per block).

    Returns:
        The probes, with their accuracy if `val_batches` is given.

    Raises:
        ValueError: bad numbers, no batches, labels that do not fit, features that are not finite,
            a loss that is not finite.
    """
    if epochs < 1 or not lr > 0 or not weight_decay >= 0:
        raise ValueError(
            f"need epochs >= 1, lr > 0, weight_decay >= 0; got {epochs=} {lr=} {weight_decay=}"
        )
    reiterable(batches, "batches")
    device = model_device(model, device)
    features = CachedHeads(
        model, batches, device, feature_dtype, cache_bytes, disk_bytes, disk_folder
    )
    with frozen(model, device):
        first = next(head_batches(model, batches, device))
        names = block_names(model, len(first.heads))
        generator = torch.Generator().manual_seed(seed)
        learners = [
            _Learner(x.float(), first.logits.shape[1], layer_norm, generator) for x in first.heads
        ]
        _fit(learners, features, epochs, lr, weight_decay, backend, progress)
    settings = {
        "epochs": epochs,
        "lr": lr,
        "weight_decay": weight_decay,
        "feature_dtype": str(feature_dtype).removeprefix("torch."),
        "seed": seed,
    }
    probes = Probes(tuple(p.raw() for p in learners), names, layer_norm, settings=settings)
    if val_batches is None:
        return probes
    return evaluate_probes(model, probes, val_batches, device=device, backend=backend)


class _Learner(nn.Module):
    """One probe in coordinates where the channels of the tokens have mean 0 and deviation 1.

    A change of coordinates only: the same functions are reachable, but one learning rate then
    suits every block, whatever the scale of its heads.
    """

    def __init__(self, x: Tensor, num_classes: int, layer_norm: bool, generator: torch.Generator):
        super().__init__()
        self.layer_norm = layer_norm
        self.shape = x.shape[2:]
        tokens = normalized(x, layer_norm).flatten(2).flatten(0, 1)  # (B * N, C)
        std = tokens.std(0, correction=0)
        # channels that hardly move are not blown up: they would carry rounding only
        floor = 0.05 * std.square().mean().sqrt()
        std = torch.where(floor > 0, std.maximum(floor), torch.ones_like(std))
        self.mean, self.std = tokens.mean(0), std
        C, device = tokens.shape[1], x.device
        weight = torch.empty(num_classes, C)
        nn.init.trunc_normal_(weight, std=0.02, generator=generator)
        self.pool_weight = nn.Parameter(torch.zeros(C, device=device))
        self.fc_weight = nn.Parameter(weight.to(device))
        self.fc_bias = nn.Parameter(torch.zeros(num_classes, device=device))

    def forward(self, x: Tensor, backend: str | None) -> Tensor:
        x = normalized(x.float(), self.layer_norm)
        pooled = pool_all(x, self.pool_weight / self.std, backend)
        return F.linear((pooled - self.mean) / self.std, self.fc_weight, self.fc_bias)

    @torch.no_grad()
    def raw(self) -> BlockProbe:
        """The same probe in the model's coordinates, on the CPU."""
        fc = (self.fc_weight / self.std).double()
        bias = self.fc_bias - fc @ self.mean.double()
        return BlockProbe(
            (self.pool_weight / self.std).view(self.shape).cpu(),
            fc.float().view(-1, *self.shape).cpu(),
            bias.float().cpu(),
        )


def _fit(
    learners: list[_Learner],
    features: Iterable[tuple[tuple[Tensor, ...], Tensor]],
    epochs: int,
    lr: float,
    weight_decay: float,
    backend: str | None,
    progress: Callable[[int, int, float], None] | None,
) -> None:
    """One optimiser for all blocks: the loss is a sum whose terms share no parameter."""
    biases = [p.fc_bias for p in learners]
    weights = [w for p in learners for w in (p.pool_weight, p.fc_weight)]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        total, count = torch.zeros((), device=biases[0].device), 0
        for heads, labels in features:
            losses = [
                F.cross_entropy(p(x, backend), labels) for p, x in zip(learners, heads, strict=True)
            ]
            loss = torch.stack(losses).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, count = total + loss.detach() * len(labels), count + len(labels)
        schedule.step()
        mean_loss = float(total) / (count * len(learners))
        if not math.isfinite(mean_loss):
            raise ValueError(f"probes diverged in epoch {epoch + 1}; lower lr, now {lr}")
        if progress is not None:
            progress(epoch + 1, epochs, mean_loss)
