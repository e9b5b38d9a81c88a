"""glyphs100: a generated 100-class set of 32x32 colour images of letters, digits and symbols.

Image i of a split is a function of (generator version, seed, split, tier, i) and the font files
alone, in integer arithmetic: any subset in any order gives the same pixels on every machine.
Training images show ten DejaVu faces, test images two others.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from . import glyph_fonts
from ._hashing import SampleDraws, make_key
from .dataset import ImageDataset, Stats
from .errors import DatasetError
from .glyph_classes import CLASS_NAMES, COARSE_NAMES, COARSE_OF_CLASS

VERSION = "glyphs100-1"
IMAGE_SIZE = 32
DEFAULT_SIZES = {"train": 10_000, "test": 2_000}
FACES_OF_SPLIT = {"train": glyph_fonts.TRAIN_FACES, "test": glyph_fonts.TEST_FACES}
_ONE = 1 << 16  # fixed-point one of the affine maps
_CHUNK = 256  # samples rendered at once; bounds the memory


@dataclass(frozen=True)
class Tier:
    """How much a glyph is disturbed; `mean` and `std` are those of the default training split.

    Attributes:
        sample_sha256: what `sample_sha256` must give.
        turn: largest tangent of half the rotation angle, in 1/1024.
        zoom: smallest and largest size, in percent.
        shear: largest horizontal shear, in percent.
        shift: largest displacement, in half pixels.
        tone: ink and ground are drawn from [0, tone] and [255 - tone, 255], or the reverse.
        ground: how far the ground's 4x4 colour grid strays from one colour, in 1/256.
        distractors: pieces of other glyphs behind the glyph.
        occluder: side range of a rectangle over the glyph, in pixels; (0, 0) is none.
        noise: largest change of one byte.
    """

    mean: Stats
    std: Stats
    sample_sha256: str
    turn: int = 0
    zoom: tuple[int, int] = (100, 100)
    shear: int = 0
    shift: int = 0
    tone: int = 90
    ground: int = 0
    distractors: int = 0
    occluder: tuple[int, int] = (0, 0)
    noise: int = 0


TIERS = {
    "easy": Tier(
        mean=(0.5041, 0.503, 0.5025),
        std=(0.333, 0.331, 0.3304),
        sample_sha256="37ee32b659aad38ac76a23d4da599c8acfa8d9a8a89d75be0a5f741fb201f90a",
        turn=27,
        zoom=(95, 110),
        shift=3,
    ),
    "medium": Tier(
        mean=(0.5018, 0.5013, 0.5013),
        std=(0.2902, 0.2901, 0.2906),
        sample_sha256="a1cd1a1a3e0f27c2c4684ada3c275c7473c74ff693f4d0b5c12daa2fd5605fd2",
        turn=135,
        zoom=(80, 115),
        shear=15,
        shift=6,
        tone=110,
        ground=200,
    ),
    "hard": Tier(
        mean=(0.5003, 0.4999, 0.5003),
        std=(0.268, 0.267, 0.2676),
        sample_sha256="9e648a1e4f2c4b777ffc8f0c7d562b7a88c133e23736d6edbee1f02254fd9432",
        turn=135,
        zoom=(75, 115),
        shear=20,
        shift=6,
        tone=115,
        ground=256,
        distractors=2,
        occluder=(5, 9),
        noise=24,
    ),
}


def load_glyphs100(
    split: str, *, tier: str = "easy", size: int | None = None, seed: int = 0
) -> ImageDataset:
    """Draw a split of glyphs100.

    Args:
        split: "train" or "test"; the test split shows two faces that training never shows.
        tier: "easy", "medium" or "hard".
        size: number of images, by default 10 000 and 2 000; image i has label i % 100.
        seed: another seed gives other images.

    Raises:
        DatasetError: unknown tier or split, size below 1, fonts missing or of another version.
    """
    size = DEFAULT_SIZES.get(split, 1) if size is None else size
    if size < 1:
        raise DatasetError(f"glyphs100: size must be >= 1, got {size}")
    images = draw_images(np.arange(size), split, tier=tier, seed=seed)
    labels = torch.arange(size) % len(CLASS_NAMES)
    return ImageDataset(
        name=f"glyphs100-{tier} (generated)",
        images=torch.from_numpy(images),
        labels=labels,
        class_names=CLASS_NAMES,
        mean=TIERS[tier].mean,
        std=TIERS[tier].std,
        generated=True,
        coarse_labels=torch.tensor(COARSE_OF_CLASS)[labels],
        coarse_names=COARSE_NAMES,
    )


def draw_images(index: np.ndarray, split: str, *, tier: str = "easy", seed: int = 0) -> np.ndarray:
    """Images of the named samples: (M,) sample numbers to (M, 3, 32, 32) uint8."""
    if tier not in TIERS:
        raise DatasetError(f"unknown tier {tier!r}; allowed: {', '.join(TIERS)}")
    if split not in FACES_OF_SPLIT:
        raise DatasetError(f"unknown split {split!r}; allowed: {', '.join(FACES_OF_SPLIT)}")
    images = np.empty((len(index), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    key = make_key(VERSION, tier, seed, split)
    glyphs = _padded_bitmaps(FACES_OF_SPLIT[split])
    for start in range(0, len(index), _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _draw(index[part], key, glyphs, TIERS[tier])
    return images


def verify_glyphs100(tier: str = "easy") -> list[str]:
    """Check the font files and that this machine draws the published pixels.

    Raises:
        DatasetError: unknown tier, another font version, or other pixels.
    """
    for face in glyph_fonts.FACES:
        glyph_fonts.check_font(face)
    lines = [f"fonts: {len(glyph_fonts.FACES)} DejaVu files in matplotlib, sha256 matches"]
    found = sample_sha256(tier)
    if found != TIERS[tier].sample_sha256:
        raise DatasetError(
            f"glyphs100-{tier}: sample images have sha256 {found}, "
            f"expected {TIERS[tier].sample_sha256}"
        )
    return [*lines, f"glyphs100-{tier} (generated): sample images have the published sha256"]


def sample_sha256(tier: str) -> str:
    """Hash of the first 100 images of both splits at seed 0."""
    samples = [draw_images(np.arange(100), split, tier=tier) for split in FACES_OF_SPLIT]
    return hashlib.sha256(b"".join(images.tobytes() for images in samples)).hexdigest()


@functools.cache
def _padded_bitmaps(faces: tuple[str, ...]) -> np.ndarray:
    """(F, 100, SIZE + 2, SIZE + 2) uint8: a margin spares a bounds test per tap."""
    stacked = np.stack([glyph_fonts.bitmaps(face) for face in faces])
    return np.pad(stacked, ((0, 0), (0, 0), (1, 1), (1, 1)))


def _draw(index: np.ndarray, key: np.uint64, glyphs: np.ndarray, tier: Tier) -> np.ndarray:
    """One chunk: (m,) sample numbers to (m, 3, 32, 32) uint8."""
    draws = SampleDraws(key, index)
    dark = draws.integers(0, tier.tone, 2, 3)  # one colour for ink or ground, one for both ends
    light_ink = draws.integers(0, 1, 1)
    ink = np.where(light_ink == 1, 255 - dark[:, 0], dark[:, 0])[:, :, None, None]
    canvas = _ground(draws, dark[:, 1], light_ink, tier)
    for _ in range(tier.distractors):
        colour = draws.integers(90, 165, 3)[:, :, None, None]
        canvas = _blend(canvas, colour, _distractor(draws, glyphs))
    face = draws.integers(0, len(glyphs) - 1)
    shift = draws.integers(-tier.shift, tier.shift, 2)
    which = face * len(CLASS_NAMES) + index.astype(np.int32) % len(CLASS_NAMES)
    canvas = _blend(canvas, ink, _sample(glyphs, which, _affine(draws, tier), shift))
    if tier.occluder[1]:
        canvas = _occlude(draws, canvas, tier)
    if tier.noise:
        canvas = canvas + draws.integers(-tier.noise, tier.noise, 3, IMAGE_SIZE, IMAGE_SIZE)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _ground(draws: SampleDraws, dark: np.ndarray, light_ink: np.ndarray, tier: Tier) -> np.ndarray:
    """(m, 3, 32, 32) int32: one colour, or a 4x4 grid of colours blended bilinearly."""
    nodes = dark[:, :, None, None]
    if tier.ground:
        other = draws.integers(0, tier.tone, 3, 4, 4)
        nodes = nodes + ((other - nodes) * tier.ground >> 8)
    nodes = np.where(light_ink[:, :, None, None] == 1, nodes, 255 - nodes)
    if not tier.ground:
        return np.broadcast_to(nodes, (len(dark), 3, IMAGE_SIZE, IMAGE_SIZE))
    position = np.arange(IMAGE_SIZE, dtype=np.int32) * (3 * 256) // (IMAGE_SIZE - 1)
    left = np.minimum(position >> 8, 2)
    weight = position - (left << 8)
    rows = nodes[:, :, :, left] * (256 - weight) + nodes[:, :, :, left + 1] * weight
    weight = weight[:, None]
    return (rows[:, :, left] * (256 - weight) + rows[:, :, left + 1] * weight) >> 16


def _blend(canvas: np.ndarray, colour: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Paint `colour` (m, 3, 1, 1) where `cover` (m, 32, 32), 0 to 255, says so."""
    # 257/65536 is 1/255 to within the last bit, and 255 covers fully
    cover = (cover + (cover >> 7))[:, None]
    return canvas + ((colour - canvas) * cover >> 8)


def _distractor(draws: SampleDraws, glyphs: np.ndarray) -> np.ndarray:
    """Coverage of any glyph pushed 9 to 13 pixels off the centre, along one axis at least."""
    which = draws.integers(0, glyphs.shape[0] * glyphs.shape[1] - 1)
    away = draws.integers(18, 26, 2) * (2 * draws.integers(0, 1, 2) - 1)
    along = draws.integers(-26, 26, 1)
    axis = draws.integers(0, 1)
    away[np.arange(len(away)), axis] = along[:, 0]
    upright = np.tile(np.array([_ONE, 0, 0, _ONE], dtype=np.int32), (len(which), 1))
    return _sample(glyphs, which, upright, away)


def _affine(draws: SampleDraws, tier: Tier) -> np.ndarray:
    """(m, 4) int32 row-major 2x2 maps from image to bitmap: unzoom, unturn, unshear."""
    half_turn = draws.integers(-tier.turn, tier.turn).astype(np.int64)
    zoom = draws.integers(*tier.zoom).astype(np.int64)
    shear = draws.integers(-tier.shear, tier.shear).astype(np.int64)
    # cos and sin from the tangent t of half the angle are rational: no libm, exact everywhere
    t, one = half_turn, 1024
    cos = (one * one - t * t) * _ONE // (one * one + t * t) * 100 // zoom
    sin = 2 * one * t * _ONE // (one * one + t * t) * 100 // zoom
    rows = [cos, cos * shear // 100 - sin, sin, sin * shear // 100 + cos]
    return np.stack(rows, axis=1).astype(np.int32)


def _sample(
    glyphs: np.ndarray, which: np.ndarray, affine: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """Bilinear samples of the chosen bitmaps at every image pixel: (m, 32, 32) int32, 0 to 255."""
    size = glyphs.shape[-1]
    # pixel centres relative to the image's middle, in bitmap pixels (half image pixels)
    centre = np.arange(1 - IMAGE_SIZE, IMAGE_SIZE, 2, dtype=np.int32)
    u = (centre[None] - shift[:, :1])[:, None, :]  # (m, 1, 32)
    v = (centre[None] - shift[:, 1:])[:, :, None]  # (m, 32, 1)
    a, b, c, d = (affine[:, i, None, None] for i in range(4))
    middle = np.int32((size - 1) * _ONE // 2)
    x, y = a * u + b * v + middle, c * u + d * v + middle
    x, y = (np.clip(p, 0, (size - 1) * _ONE - 1) for p in (x, y))
    fx, fy = (x >> 8) & 255, (y >> 8) & 255
    flat = glyphs.reshape(-1)
    corner = which[:, None, None] * np.int32(size * size) + (y >> 16) * np.int32(size) + (x >> 16)
    tap = [flat[corner + offset].astype(np.int32) for offset in (0, 1, size, size + 1)]
    top, bottom = (tap[i] * (256 - fx) + tap[i + 1] * fx for i in (0, 2))
    return (top * (256 - fy) + bottom * fy) >> 16


def _occlude(draws: SampleDraws, canvas: np.ndarray, tier: Tier) -> np.ndarray:
    """Paint one rectangle of one colour somewhere inside each image."""
    sides = draws.integers(*tier.occluder, 2)
    start = draws.integers(0, 1023, 2) * (IMAGE_SIZE - sides + 1) >> 10
    colour = draws.integers(0, 255, 3)[:, :, None, None]
    p = np.arange(IMAGE_SIZE, dtype=np.int32)
    inside = (p >= start[:, :, None]) & (p < (start + sides)[:, :, None])  # (m, 2, 32)
    return np.where((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], colour, canvas)
