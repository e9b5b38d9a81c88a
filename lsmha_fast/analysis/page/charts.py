"""Line charts as inline SVG: lines differ in colour, dash and mark, every mark has its number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeGuard

from markupsafe import Markup

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 40
MARKED = 40  # more points than this are drawn without a mark of their own
COLOURS, DASHES, MARKS = 6, 3, 4  # as many of each in page.css and in `_SHAPES`
_SHAPES = (
    "M{x0} {y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M{x0} {y0}h8v8h-8z",
    "M{x} {y0}l5 8.5h-10z",
    "M{x} {y0}l5 4l-5 5l-5 -5z",
)
Place = Callable[[float, float], tuple[float, float]]


class Series(NamedTuple):
    """One line of a chart: a value per position, perhaps with an interval around each."""

    name: str
    values: Sequence[float | None]  # None and what is not finite leave a gap
    intervals: Sequence[Sequence[float | None]] | None = None  # (low, high) per position


def line_chart(
    title: str,
    x: Sequence[float],
    series: Sequence[Series],
    *,
    x_title: str,
    x_names: Sequence[str] | None = None,
    percent: bool = False,
    from_zero: bool = True,
    note: str = "",
) -> Markup:
    """One chart with a line per series.

    Args:
        title: what is shown; also the text alternative.
        x: positions, increasing.
        series: the lines, each with one value per position.
        x_title: under the axis.
        x_names: names of the positions on the axis instead of numbers.
        percent: values are 0..1 and shown as percentages.
        from_zero: the axis begins at 0 where no value is below.
        note: a line under the legend.

    Returns:
        A figure with the picture and its legend, safe to put into HTML.
    """
    bounds = [edge for s in series for pair in s.intervals or () for edge in pair]
    values = [v for v in (*bounds, *(v for s in series for v in s.values)) if _finite(v)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    ticks = nice_ticks(min(low, 0.0) if from_zero else low, high)
    low, high = ticks[0], ticks[-1]
    x_low, x_high = (x[0], x[-1]) if len(x) > 1 else (x[0] - 1, x[0] + 1)

    def place(a: float, b: float) -> tuple[float, float]:
        across = (a - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = (b - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    text = Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>')
    parts = [
        _value_axis(ticks, place, x_low, percent),
        _position_axis(x, x_names, place, low),
        text.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_title),
        *(_band(s, x, place, number) for number, s in enumerate(series)),
        *(_line(s, x, place, number) for number, s in enumerate(series)),
    ]
    if len(x) <= MARKED:
        where = [f"{x_title} {x_names[i] if x_names else number_text(a)}" for i, a in enumerate(x)]
        parts += [_marks(s, x, where, place, number, percent) for number, s in enumerate(series)]
    picture = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(parts)
    )
    below = Markup('<p class="note">{}</p>').format(note) if note else ""
    return Markup('<figure class="chart"><figcaption>{}</figcaption>{}{}{}</figure>').format(
        title, picture, _legend(series), below
    )


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that span [low, high], for an axis."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number_text(value: float | int | None, percent: bool = False) -> str:
    """A number as people write it: few digits, none that say nothing."""
    if value is None:
        return "\u2013"  # no value
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "\u221e" if value > 0 else "-\u221e"
    if percent:
        return f"{100 * value:.4g} %"
    return f"{int(value)}" if float(value).is_integer() else digits(value)


def digits(value: float) -> str:
    """Three digits, and no fewer where they are zeros."""
    size = abs(value)
    return f"{value:.3g}" if size < 1 else f"{value:.{2 if size < 10 else 1 if size < 100 else 0}f}"


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _style(number: int) -> str:
    return f"s{number % COLOURS} d{number % DASHES}"


def _value_axis(ticks: Sequence[float], place: Place, x_low: float, percent: bool) -> Markup:
    row = Markup(
        '<line x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
        '<text x="{3}" y="{2:.1f}" dy=".35em" text-anchor="end">{4}</text>'
    )
    return Markup("").join(
        row.format(
            LEFT,
            WIDTH - RIGHT,
            place(x_low, t)[1],
            LEFT - 6,
            f"{100 * t:g} %" if percent else f"{t:g}",
        )
        for t in ticks
    )


def _position_axis(
    x: Sequence[float], names: Sequence[str] | None, place: Place, low: float
) -> Markup:
    every = math.ceil(len(x) / 8)
    text = Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>')
    parts = []
    for i in range(0, len(x), every):
        at_edge = names is not None and len(x) > 1
        edge = "start" if at_edge and i == 0 else "end" if at_edge and i == len(x) - 1 else "middle"
        name = names[i] if names else number_text(x[i])
        parts.append(text.format(place(x[i], low)[0], HEIGHT - BOTTOM + 15, edge, name))
    return Markup("").join(parts)


def _line(series: Series, x: Sequence[float], place: Place, number: int) -> Markup:
    commands, pen = [], "M"
    for a, b in zip(x, series.values, strict=True):
        if not _finite(b):
            pen = "M"
            continue
        commands.append("{}{:.1f} {:.1f}".format(pen, *place(a, b)))
        pen = "L"
    return Markup('<path class="l {}" d="{}"/>').format(_style(number), " ".join(commands))


def _band(series: Series, x: Sequence[float], place: Place, number: int) -> Markup:
    """The area of the intervals, where all of them are finite, else whiskers of those that are."""
    known = [
        (a, low, high)
        for a, (low, high) in zip(x, series.intervals or (), strict=False)
        if _finite(low) and _finite(high)
    ]
    if len(known) == len(x) > 1:
        edge = [place(a, high) for a, _, high in known]
        edge += [place(a, low) for a, low, _ in reversed(known)]
        shape = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in edge) + "z"
        return Markup('<path class="b {}" d="{}"/>').format(_style(number), shape)
    whisker = "M{:.1f} {:.1f}V{:.1f}"
    shape = "".join(whisker.format(*place(a, low), place(a, high)[1]) for a, low, high in known)
    return Markup('<path class="l {}" d="{}"/>').format(_style(number), shape)


def _marks(
    series: Series, x: Sequence[float], where: Sequence[str], place: Place, number: int, pct: bool
) -> Markup:
    mark = Markup('<path class="m {}" d="{}"><title>{}</title></path>')
    parts = []
    for i, (a, value) in enumerate(zip(x, series.values, strict=True)):
        if not _finite(value):
            continue
        left, top = place(a, value)
        spots = {"x": left, "y": top, "x0": left - 4, "y0": top - 4}
        shape = _SHAPES[number % MARKS].format(**{k: f"{v:.1f}" for k, v in spots.items()})
        text = f"{series.name}, {where[i]}: {number_text(value, pct)}"
        if series.intervals:
            low, high = series.intervals[i]
            text += f" ({number_text(low, pct)} to {number_text(high, pct)})"
        parts.append(mark.format(_style(number), shape, text))
    return Markup("").join(parts)


def _legend(series: Sequence[Series]) -> Markup:
    if len(series) < 2:
        return Markup("")
    item = Markup(
        '<li><svg viewBox="0 0 34 12" aria-hidden="true"><path class="l {0}" d="M0 6h34"/>'
        '<path class="m {0}" d="{1}"/></svg>{2}</li>'
    )
    parts = []
    for number, s in enumerate(series):
        shape = _SHAPES[number % MARKS].format(x=17, y=6, x0=13, y0=2)
        parts.append(item.format(_style(number), shape, s.name))
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(parts))
