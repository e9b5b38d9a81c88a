"""Glyph bitmaps from the outlines of matplotlib's DejaVu fonts, in integer arithmetic only.

Font rasterisers change pixels between versions (Pillow and matplotlib both bundle FreeType), so the
outlines, which are integers in the font file, are filled here; the pixels then depend on nothing
but the font files, and those are pinned by hash.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DatasetError, require
from .glyph_classes import CHARACTERS

# sha256 of DejaVu<face>.ttf, version 2.37 as shipped with matplotlib
FONT_SHA256 = {
    "Sans-Bold": "b184b89e3c1075f22f6b71575b6fc20d4972b3cfd3b23322ca6fd596dcaef167",
    "Sans-BoldOblique": "6edf0283160186af451cbee71e7b845f2e4cabf264bb992ce668c83c25465e6f",
    "Sans-Oblique": "ccdf74b350f11fd3dd5774de50e5e6346a1a5da1f5b7d5fb83590665e97a5213",
    "Sans": "3fdf69cabf06049ea70a00b5919340e2ce1e6d02b0cc3c4b44fb6801bd1e0d22",
    "SansMono-Bold": "baada9a5172fe20886251aff0433fc38461912d5daf07287e7bee56620a8da96",
    "SansMono-BoldOblique": "a69081c15c76c827e0a27a5a7f5c74b6135c843499955495ffa8c20d3a98288b",
    "SansMono-Oblique": "28052813f7a709fc89f52d192dc995ef4f0fdc5c3d7b73a49d6849b1916d0cd0",
    "SansMono": "602ec86b8948cfcd956482fe64f94c36c867770149ef2f791d4613f443bcecb3",
    "Serif-Bold": "c3753f2ed6bc673f15846dc45addbeb3b9c872f32fb18fd53a21f1bef1ed7676",
    "Serif-BoldItalic": "d93efec7a9d2e826768d1a2ee95b95870e15e29599a84f3484af1de1cec2e181",
    "Serif-Italic": "3e7994fbc54fa10ce3352a42d548fadd7d9cadb69cb1109bc9d960f6dac57f04",
    "Serif": "107244956e9962b9e96faccdc551825e0ae0898ae13737133e1b921a2fd35ffa",
}
FACES = tuple(FONT_SHA256)
# one sans and one serif face that no training image shows
TEST_FACES = ("SansMono-Oblique", "Serif-Bold")
TRAIN_FACES = tuple(face for face in FACES if face not in TEST_FACES)

SIZE = 64  # a bitmap is SIZE x SIZE, twice the resolution of an image
_OVERSAMPLE = 4
_GRID = SIZE * _OVERSAMPLE
_UNITS = 10  # font units (2048 per em) between two sample points: the bitmap spans 2560
_CENTRE_Y = 636  # half way between the deepest descender and the highest accent of the classes
_MAX_WIDTH = 2240  # wider ink is condensed to this, 28 of 32 image pixels
_CURVE_STEPS = 8  # segments per quadratic curve
_SCALE = 2 * _CURVE_STEPS**2  # keeps implied points and curve points exact integers

Edges = list[tuple[int, int, int, int]]


def font_folder() -> Path:
    """Where matplotlib keeps its fonts."""
    return Path(require("matplotlib", "glyphs100").get_data_path()) / "fonts" / "ttf"


def check_font(face: str, folder: Path | None = None) -> Path:
    """Path of a face's file after its hash was compared with the pinned one.

    Raises:
        DatasetError: unknown face, no such file, or another hash (both are named).
    """
    if face not in FONT_SHA256:
        raise DatasetError(f"unknown face {face!r}; allowed: {', '.join(FACES)}")
    path = (folder or font_folder()) / f"DejaVu{face}.ttf"
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DatasetError(f"glyphs100 needs the font file {path}: {error.strerror}") from None
    if found != FONT_SHA256[face]:
        raise DatasetError(
            f"glyphs100: {path} has sha256 {found}, expected {FONT_SHA256[face]}; "
            "another font version would draw other images"
        )
    return path


@functools.cache
def bitmaps(face: str) -> np.ndarray:
    """Coverage of every class's glyph in one face: (100, SIZE, SIZE) uint8, read-only."""
    path = check_font(face)
    glyphs = [_glyph_edges(outline) for outline in _outlines(path)]
    result = _fill(glyphs)
    result.flags.writeable = False
    return result


def _outlines(path: Path) -> list[list]:
    """Drawing commands of each class's character, composites resolved."""
    tt_font = require("fontTools.ttLib", "glyphs100").TTFont(path, lazy=True)
    pens = require("fontTools.pens.recordingPen", "glyphs100")
    names, glyphs = tt_font.getBestCmap(), tt_font.getGlyphSet()
    outlines = []
    for char in CHARACTERS:
        pen = pens.DecomposingRecordingPen(glyphs)
        glyphs[names[ord(char)]].draw(pen)
        outlines.append(pen.value)
    return outlines


def _glyph_edges(outline: list) -> np.ndarray:
    """(E, 4) int64 edges x0 y0 x1 y1 in units of 1/_SCALE, ink centred on x = 0."""
    edges: Edges = []
    start = point = (0, 0)
    for command, raw in outline:
        points: list[Any] = [p and (p[0] * _SCALE, p[1] * _SCALE) for p in raw]
        if command == "moveTo":
            start = point = points[0]
        elif command == "lineTo":
            edges.append((*point, *points[0]))
            point = points[0]
        elif command == "qCurveTo":
            if points[-1] is None:  # a contour without any on-curve point
                start = point = _midpoint(points[-2], points[0])
                points[-1] = start
            point = _curve(edges, point, points)
        elif point != start:  # closePath
            edges.append((*point, *start))
            point = start
    return _centred(np.array(edges, dtype=np.int64))


def _midpoint(p: tuple[int, int], q: tuple[int, int]) -> tuple[int, int]:
    return (p[0] + q[0]) // 2, (p[1] + q[1]) // 2


def _curve(edges: Edges, point: tuple[int, int], points: list) -> tuple[int, int]:
    """Append a TrueType spline (control points, then the end) as straight pieces."""
    controls, end = points[:-1], points[-1]
    for i, control in enumerate(controls):
        stop = end if i + 1 == len(controls) else _midpoint(control, controls[i + 1])
        n, previous = _CURVE_STEPS, point
        for t in range(1, n + 1):
            weights = ((n - t) ** 2, 2 * t * (n - t), t * t)
            x, y = (
                sum(w * p[axis] for w, p in zip(weights, (point, control, stop), strict=True))
                // n**2
                for axis in (0, 1)
            )
            edges.append((*previous, x, y))
            previous = (x, y)
        point = stop
    return point


def _centred(edges: np.ndarray) -> np.ndarray:
    """Move the ink's middle to x = 0 and the line's middle to y = 0; condense what is too wide."""
    xs = edges[:, 0::2]
    left, right = int(xs.min()), int(xs.max())
    edges[:, 0::2] -= (left + right) // 2
    edges[:, 1::2] -= _CENTRE_Y * _SCALE
    width, limit = right - left, _MAX_WIDTH * _SCALE
    if width > limit:
        edges[:, 0::2] = edges[:, 0::2] * limit // width
    return edges


def _fill(glyphs: list[np.ndarray]) -> np.ndarray:
    """Non-zero winding fill on the sample grid, then coverage per pixel, for all glyphs at once."""
    owner = np.repeat(np.arange(len(glyphs)), [len(edges) for edges in glyphs])
    x0, y0, x1, y1 = np.concatenate(glyphs).T
    x0, x1, y0, y1 = (v + _GRID // 2 * _UNITS * _SCALE for v in (x0, x1, -y1, -y0))
    # the y axis now points down and every edge runs from (x1, y0) to (x0, y1)
    step, half = _UNITS * _SCALE, _UNITS * _SCALE // 2
    first = np.clip((np.minimum(y0, y1) - half + step - 1) // step, 0, _GRID)
    last = np.clip((np.maximum(y0, y1) - half + step - 1) // step, 0, _GRID)  # exclusive
    rows_of_edge = last - first
    edge = np.repeat(np.arange(len(owner)), rows_of_edge)
    row = np.arange(len(edge)) - np.repeat(
        np.cumsum(rows_of_edge) - rows_of_edge - first, rows_of_edge
    )
    y = row * step + half
    x = x1[edge] + (y - y0[edge]) * (x0 - x1)[edge] // (y1 - y0)[edge]
    column = np.clip((x - half + step - 1) // step, 0, _GRID)

    winding = np.zeros((len(glyphs), _GRID, _GRID + 1), dtype=np.int8)
    np.add.at(winding, (owner[edge], row, column), np.where(y1 > y0, 1, -1)[edge].astype(np.int8))
    inside = np.cumsum(winding, axis=2, dtype=np.int8)[:, :, :_GRID] != 0
    blocks = inside.reshape(len(glyphs), SIZE, _OVERSAMPLE, SIZE, _OVERSAMPLE)
    coverage = blocks.sum((2, 4), dtype=np.int32)
    return (coverage * 255 // _OVERSAMPLE**2).astype(np.uint8)
