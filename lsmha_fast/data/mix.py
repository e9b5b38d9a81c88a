"""Mixup and CutMix of a batch with its own reverse, and label smoothing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import DatasetError


class Mix(NamedTuple):
    """How one batch is mixed: the share of a sample's own label, and CutMix's box or ()."""

    weight: float = 1.0
    cut: tuple[int, ...] = ()


def draw_mix(
    rng: np.random.Generator,
    H: int,
    W: int,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float,
    switch_prob: float,
) -> Mix:
    """Method and weight of one batch, as timm's `Mixup` chooses them."""
    if (mixup_alpha == 0 and cutmix_alpha == 0) or not rng.random() < prob:
        return Mix()
    use_cutmix = cutmix_alpha > 0 and (mixup_alpha == 0 or rng.random() < switch_prob)
    alpha = cutmix_alpha if use_cutmix else mixup_alpha
    weight = float(rng.beta(alpha, alpha))
    if not use_cutmix:
        return Mix(weight)
    top, bottom, left, right = cut_box(H, W, weight, rng)
    return Mix(1 - (bottom - top) * (right - left) / (H * W), (top, bottom, left, right))


def mixup_cutmix(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    smoothing: float = 0.1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix sample b with sample B-1-b, one weight and one method per batch.

    The semantics are those of timm's `Mixup` in batch mode with corrected CutMix weight, which the
    published CCT recipe uses. A CPU generator (or None) avoids waiting for the device.

    Args:
        images: (B, C, H, W) floating.
        labels: (B,) int64.
        num_classes: K.
        mixup_alpha: parameter of Mixup's Beta distribution; 0 turns Mixup off.
        cutmix_alpha: likewise for CutMix.
        prob: probability that the batch is mixed at all.
        switch_prob: probability of CutMix where both are on.
        smoothing: label smoothing.
        generator: source of all random decisions.

    Returns:
        Images (B, C, H, W) and soft targets (B, K) in fp32 whose rows sum to one.

    Raises:
        DatasetError: images that are not floating, or a number out of its range.
    """
    _check(images, mixup_alpha, cutmix_alpha, prob, switch_prob, smoothing)
    mix = Mix()
    if mixup_alpha > 0 or cutmix_alpha > 0:
        seed = torch.randint(
            2**62, (), generator=generator, device=generator.device if generator else None
        )
        mix = draw_mix(
            np.random.default_rng(int(seed)),
            *images.shape[-2:],
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            prob=prob,
            switch_prob=switch_prob,
        )
        images = mix_images(images, mix)
    return images, soft_targets(labels, num_classes, mix.weight, smoothing)


def soft_targets(labels: Tensor, num_classes: int, weight: float, smoothing: float) -> Tensor:
    """(B, K) fp32: `weight` of each sample's smoothed label, the rest of its partner's."""
    off = smoothing / num_classes
    target = torch.full(
        (labels.shape[0], num_classes), off, dtype=torch.float32, device=labels.device
    )
    target.scatter_(1, labels[:, None], 1 - smoothing + off)
    return target * weight + target.flip(0) * (1 - weight)


def cut_box(H: int, W: int, weight: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """CutMix's rectangle (top, bottom, left, right): 1 - weight of the area, clipped at borders."""
    ratio = (1 - weight) ** 0.5
    h, w = int(H * ratio), int(W * ratio)
    y, x = int(rng.integers(0, H)), int(rng.integers(0, W))
    top, bottom = max(y - h // 2, 0), min(y + (h + 1) // 2, H)
    return top, bottom, max(x - w // 2, 0), min(x + (w + 1) // 2, W)


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """Mix a batch (B, C, H, W) with its own reverse."""
    if mix.weight == 1.0:
        return images
    if not mix.cut:
        return images * mix.weight + images.flip(0) * (1 - mix.weight)
    top, bottom, left, right = mix.cut
    out = images.clone()
    out[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return out


def _check(images: Tensor, mixup: float, cutmix: float, *unit: float) -> None:
    if not images.is_floating_point():
        raise DatasetError(
            f"mixup_cutmix needs floating images, got {images.dtype}: normalize first"
        )
    if mixup < 0 or cutmix < 0:
        raise DatasetError(f"alphas must be >= 0, got mixup {mixup} and cutmix {cutmix}")
    for name, value in zip(("prob", "switch_prob", "smoothing"), unit, strict=True):
        if not 0 <= value <= 1:
            raise DatasetError(f"{name} must lie in [0, 1], got {value}")
