"""Small charts as inline SVG: lines and points with intervals, axes, a legend, titles on hover.

Colours come from the page's style sheet (classes ``s0`` ... ``s7``), so that a chart follows its
light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 46
STYLES = 8
SHAPES = 6
DASHES = ("none", "7 4", "2 3", "10 3 2 3", "12 6", "2 7")
DODGE = 3  # pixels between series, where there is room


@dataclass(frozen=True)
class Point:
    """A measured value.

    Args:
        x, y: Where it lies.
        title: Shown on hover.
        low, high: Its interval, if there is one.
    """

    x: float
    y: float
    title: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one method.

    Args:
        name: For the legend.
        points: Its points; joined in the order of x if `joined`.
        style: Which colour, from 0.
        shape: Which marker, from 0.
        dash: Which line, from 0; 0 is solid.
        joined: Draw a line through the points.
        hollow: Draw the markers' outlines only.
    """

    name: str
    points: list[Point] = field(default_factory=list)
    style: int = 0
    shape: int = 0
    dash: int = 0
    joined: bool = True
    hollow: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span [low, high], about `count` of them."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        raise ValueError(f"no span to put ticks on: [{low}, {high}]")
    size = 10 ** math.floor(math.log10(span / count))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m * count >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    description: str,
    level: tuple[float, str] | None = None,
    dodge: bool = False,
) -> str:
    """An SVG element; empty if there is no point.

    Args:
        series: What to draw.
        x_label, y_label: Texts beside the axes.
        description: What the chart shows, for those who do not see it.
        level: A value of y to mark with a dashed line, and its name.
        dodge: Set series beside each other, where all have the same few x: intervals at one x would
            hide each other. Together they take less than half the way to the next x.
    """
    series = [s for s in series if s.points]
    if not series:
        return ""
    points = [p for s in series for p in s.points]
    heights = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    heights += [level[0]] if level else []
    axes = _Axes(_padded([p.x for p in points]), _padded(heights))
    parts = [axes.draw(x_label, y_label)]
    name = ""
    if level:
        y = axes.y(level[0])
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        name = f'<text class="tick on" x="{LEFT + 6}" y="{y - 5}">{escape(level[1])}</text>'
    places = sorted({axes.x(p.x) for p in points})
    room = min((b - a for a, b in pairwise(places)), default=WIDTH) / 2
    step = min(DODGE, room / len(series)) if dodge else 0
    for i, one in enumerate(series):
        parts.append(_draw(one, axes, step * (i - (len(series) - 1) / 2)))
    parts.append(name)
    legend = "".join(
        f'<li><svg class="key s{s.style % STYLES}" viewBox="-18 -8 36 16" aria-hidden="true">'
        f"{_line(s, '-18,0 18,0') if s.joined else ''}{_marker(s, 0, 0)}</svg>{escape(s.name)}</li>"
        for s in series
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(description)}">{"".join(parts)}</svg>'
        f'<ul class="legend">{legend}</ul>'
    )


class _Axes:
    """Ranges of both axes, and values to pixels."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x_ticks, self.y_ticks = ticks(*x, 6), ticks(*y)

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 2)

    def draw(self, x_label: str, y_label: str) -> str:
        bottom, middle = HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2
        parts = []
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 7}" y="{y + 4}" text-anchor="end">{tick:g}</text>'
            )
        for tick in self.x_ticks:
            x = self.x(tick)
            parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
            parts.append(
                f'<text class="tick" x="{x}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>'
            )
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
            f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" '
            f'text-anchor="middle">{escape(x_label)}</text>'
            f'<text class="name" transform="translate(15 {middle}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_label)}</text>'
        )
        return "".join(parts)


def _draw(series: Series, axes: _Axes, shift: float) -> str:
    """A series, `shift` pixels to the right."""
    points = sorted(series.points, key=lambda p: p.x)
    parts = []
    if series.joined and len(points) > 1:
        path = " ".join(f"{axes.x(p.x) + shift:g},{axes.y(p.y)}" for p in points)
        parts.append(_line(series, path))
    for p in points:
        x, y = round(axes.x(p.x) + shift, 2), axes.y(p.y)
        if p.low is not None and p.high is not None:
            low, high = axes.y(p.low), axes.y(p.high)
            bar = f"M{x} {low}V{high}M{x - 3} {low}h6M{x - 3} {high}h6"
            parts.append(f'<path class="error" d="{bar}"/>')
        title = f"<title>{escape(p.title)}</title>"
        parts.append(f'<g class="point">{title}{_marker(series, x, y)}</g>')
    return f'<g class="s{series.style % STYLES}">{"".join(parts)}</g>'


def _line(series: Series, points: str) -> str:
    dash = DASHES[series.dash % len(DASHES)]
    return f'<polyline class="line" stroke-dasharray="{dash}" points="{points}"/>'


def _marker(series: Series, x: float, y: float) -> str:
    kind = "marker hollow" if series.hollow else "marker"
    match series.shape % SHAPES:
        case 0:
            return f'<circle class="{kind}" cx="{x}" cy="{y}" r="4.5"/>'
        case 1:
            return f'<rect class="{kind}" x="{x - 4}" y="{y - 4}" width="8" height="8"/>'
        case 2:
            return f'<path class="{kind}" d="M{x} {y - 5.5}l5.5 9.5h-11z"/>'
        case 3:
            return f'<path class="{kind}" d="M{x} {y - 5.5}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>'
        case 4:
            return f'<path class="{kind}" d="M{x} {y + 5.5}l5.5 -9.5h-11z"/>'
    return f'<path class="{kind}" d="M{x - 2} {y - 6}h4v12h-4z"/>'


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values, a little wider; never empty."""
    low, high = min(values), max(values)
    margin = 0.03 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = low - margin
    return (max(bottom, 0.0) if low >= 0 else bottom), high + margin
