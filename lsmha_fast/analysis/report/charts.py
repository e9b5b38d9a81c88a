"""Line charts as inline SVG: colours from the page's style sheet, every point with its number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 40
MARKS = 40  # more points than this are drawn without a mark of their own


def line_chart(
    title: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    *,
    x_title: str,
    x_names: Sequence[str] | None = None,
    percent: bool = False,
    from_zero: bool = True,
) -> Markup:
    """One chart with a line per series.

    Args:
        title: what is shown; also the text alternative.
        x: positions, increasing.
        series: name -> one value per position; None and what is not finite leave a gap.
        x_title: under the axis.
        x_names: names of the positions on the axis instead of numbers.
        percent: values are 0..1 and shown as percentages.
        from_zero: the axis begins at 0 where no value is below.

    Returns:
        A figure with the picture and its legend, safe to put into HTML.
    """
    values = [v for line in series.values() for v in line if _finite(v)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if from_zero:
        low = min(low, 0.0)
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    x_low, x_high = (x[0], x[-1]) if len(x) > 1 else (x[0] - 1, x[0] + 1) if len(x) else (0, 1)

    def place(a: float, b: float) -> tuple[float, float]:
        across = (a - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = (b - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    parts = [_value_axis(ticks, place, x_low, percent), _position_axis(x, x_names, place, low)]
    for number, (name, line) in enumerate(series.items()):
        points = list(zip(x, line, strict=True))
        parts.append(_line(points, place, number))
        if len(points) <= MARKS:
            parts += [
                _mark(place(a, b), number, f"{name}, {x_title} {_name(x_names, x, a)}: ", b, percent)
                for a, b in points
                if b is not None and _finite(b)
            ]
    axis = Markup('<text class="t" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_title
    )
    picture = Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>'
    ).format(WIDTH, HEIGHT, title, Markup("").join(parts), axis)  # fmt: skip
    return Markup('<figure class="chart"><figcaption>{}</figcaption>{}{}</figure>').format(
        title, picture, _legend(series)
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
        return "\u221e" if value > 0 else "not a number"
    if percent:
        return f"{100 * value:.4g} %"
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _name(names: Sequence[str] | None, x: Sequence[float], a: float) -> str:
    return names[list(x).index(a)] if names else number_text(a)


def _value_axis(ticks, place, x_low: float, percent: bool) -> Markup:
    row = Markup(
        '<line class="g" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
        '<text class="k" x="{3}" y="{2:.1f}" dy=".35em" text-anchor="end">{4}</text>'
    )
    return Markup("").join(
        row.format(LEFT, WIDTH - RIGHT, place(x_low, t)[1], LEFT - 6, number_text(t, percent))
        for t in ticks
    )


def _position_axis(x, names, place, low: float) -> Markup:
    every = math.ceil(len(x) / 8) or 1
    text = Markup('<text class="k" x="{:.1f}" y="{}" text-anchor="{}">{}</text>')
    parts = []
    for i, a in enumerate(x):
        if i % every == 0:
            edge = "end" if len(x) > 1 and i == len(x) - 1 and names else "middle"
            edge = "start" if len(x) > 1 and i == 0 and names else edge
            name = names[i] if names else number_text(a)
            parts.append(text.format(place(a, low)[0], HEIGHT - BOTTOM + 15, edge, name))
    return Markup("").join(parts)


def _line(points, place, number: int) -> Markup:
    commands, pen = [], "M"
    for a, b in points:
        if not _finite(b):
            pen = "M"
            continue
        commands.append("{}{:.1f} {:.1f}".format(pen, *place(a, b)))
        pen = "L"
    return Markup('<path class="s{}" d="{}"/>').format(number % 6, " ".join(commands))


def _mark(at, number: int, what: str, value: float, percent: bool) -> Markup:
    return Markup(
        '<circle class="s{}" cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>'
    ).format(number % 6, *at, what + number_text(value, percent))


def _legend(series: Mapping[str, object]) -> Markup:
    if len(series) < 2:
        return Markup("")
    item = Markup('<li class="s{}">{}</li>')
    items = Markup("").join(item.format(i % 6, escape(n)) for i, n in enumerate(series))
    return Markup('<ul class="legend">{}</ul>').format(items)
