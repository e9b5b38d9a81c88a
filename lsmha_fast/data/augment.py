"""Augmentation of whole batches on their own device, each sample with its own random numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import DatasetError

_FILLS = ("zero", "edge")
_ERASE_MODES = ("pixel", "zero")


@dataclass(frozen=True)
class Augment:
    """Random crop with padding, horizontal flip and random erasing, in this order.

    Called with images (B, C, H, W), uint8 or floating, it returns new images of the same shape and
    dtype. All random numbers come from `generator`, on the generator's device: a CPU generator
    gives the same augmentation whatever device the images are on.

    Attributes:
        crop_padding: largest displacement in pixels; 0 is no crop.
        crop_fill: what shows beyond the border, "zero" or "edge" (the border pixel repeated).
        flip: probability of a horizontal flip.
        erase_prob: probability that one rectangle of a sample is erased.
        erase_area: smallest and largest part of the image that is erased.
        erase_aspect: smallest and largest height/width ratio of the rectangle.
        erase_mode: "pixel" fills with noise (N(0, 1) in floating images, as timm does after
            normalisation; uniform bytes in uint8 images), "zero" with zeros.
    """

    crop_padding: int = 4
    crop_fill: str = "zero"
    flip: float = 0.5
    erase_prob: float = 0.0
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    erase_aspect: tuple[float, float] = (0.3, 1 / 0.3)
    erase_mode: str = "pixel"

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise DatasetError(f"crop_padding must be >= 0, got {self.crop_padding}")
        for field in ("flip", "erase_prob"):
            if not 0 <= getattr(self, field) <= 1:
                raise DatasetError(f"{field} must lie in [0, 1], got {getattr(self, field)}")
        if self.crop_fill not in _FILLS or self.erase_mode not in _ERASE_MODES:
            raise DatasetError(
                f"crop_fill must be one of {_FILLS}, erase_mode one of {_ERASE_MODES}, "
                f"got {self.crop_fill!r} and {self.erase_mode!r}"
            )
        for field, limit in (("erase_area", 1.0), ("erase_aspect", math.inf)):
            low, high = getattr(self, field)
            if not 0 < low <= high <= limit:
                raise DatasetError(f"{field} must be 0 < low <= high <= {limit}, got {low}, {high}")

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, C, H, W), each changed by numbers of its own from `generator`."""
        B = images.shape[0]
        if self.crop_padding:
            top_left = _integers(2 * self.crop_padding + 1, (2, B), images, generator)
            images = crop(images, *(top_left - self.crop_padding), fill=self.crop_fill)
        if self.flip:
            device = _draw_device(images, generator)
            chance = torch.rand(B, generator=generator, device=device)
            images = flip(images, (chance < self.flip).to(images.device))
        if self.erase_prob:
            images = torch.where(
                self._boxes(images, generator), self._fill(images, generator), images
            )
        return images

    def _boxes(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """(B, 1, H, W) bool: the erased pixels."""
        B, _, H, W = images.shape
        # computed where the numbers are drawn: another device may round exp and sqrt differently
        device = _draw_device(images, generator)
        chance, area, aspect, top, left = torch.rand((5, B), generator=generator, device=device)
        area = (self.erase_area[0] + area * (self.erase_area[1] - self.erase_area[0])) * (H * W)
        low, high = (math.log(v) for v in self.erase_aspect)
        aspect = torch.exp(low + aspect * (high - low))
        h = torch.sqrt(area * aspect).round().clamp(1, H)
        w = torch.sqrt(area / aspect).round().clamp(1, W)
        top, left = (top * (H - h + 1)).floor(), (left * (W - w + 1)).floor()
        h = h * (chance < self.erase_prob)
        return box_mask(H, W, *torch.stack([top, top + h, left, left + w]).to(images.device))

    def _fill(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.erase_mode == "zero":
            return images.new_zeros(())
        if images.dtype == torch.uint8:
            return _integers(256, images.shape, images, generator).to(torch.uint8)
        device = _draw_device(images, generator)
        noise = torch.randn(images.shape, generator=generator, device=device)
        return noise.to(images)


def default_augment(name: str) -> Augment:
    """The augmentation that suits a data set; letters and digits must not be mirrored.

    Args:
        name: "digits", "glyphs100" (with or without tier) or "cifar100".

    Returns:
        The transform of a batch.

    Raises:
        DatasetError: no such data set.
    """
    if name.startswith("cifar100"):
        return Augment(crop_padding=4, flip=0.5, erase_prob=0.25)
    if name.startswith(("digits", "glyphs100")):
        return Augment(crop_padding=2, crop_fill="edge", flip=0.0)
    raise DatasetError(f"unknown data set {name!r}; allowed: digits, glyphs100, cifar100")


def crop(images: Tensor, dy: Tensor, dx: Tensor, *, fill: str = "zero") -> Tensor:
    """Shift the view of each sample: out[b, :, i, j] = images[b, :, i + dy[b], j + dx[b]].

    Args:
        images: (B, C, H, W), any dtype.
        dy: (B,) int64.
        dx: (B,) int64.
        fill: "zero" or "edge", what stands beyond the border.
    """
    _, C, H, W = images.shape
    rows = torch.arange(H, device=images.device) + dy[:, None]  # (B, H)
    columns = torch.arange(W, device=images.device) + dx[:, None]  # (B, W)
    row_index = rows.clamp(0, H - 1)[:, None, :, None].expand(-1, C, H, W)
    column_index = columns.clamp(0, W - 1)[:, None, None, :].expand(-1, C, H, W)
    out = images.gather(2, row_index).gather(3, column_index)
    if fill == "edge":
        return out
    inside = ((rows >= 0) & (rows < H))[:, :, None] & ((columns >= 0) & (columns < W))[:, None, :]
    return out.masked_fill(~inside[:, None], 0)


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen samples: (B, C, H, W) with a (B,) bool."""
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def box_mask(H: int, W: int, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(B, 1, H, W) bool, true in rows [top, bottom) and columns [left, right), each (B,)."""
    y, x = torch.arange(H, device=top.device), torch.arange(W, device=top.device)
    rows = (y >= top[:, None]) & (y < bottom[:, None])
    columns = (x >= left[:, None]) & (x < right[:, None])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _draw_device(images: Tensor, generator: torch.Generator | None) -> torch.device:
    return images.device if generator is None else generator.device


def _integers(
    high: int, shape: tuple[int, ...], images: Tensor, generator: torch.Generator | None
) -> Tensor:
    device = _draw_device(images, generator)
    return torch.randint(high, shape, generator=generator, device=device).to(images.device)
