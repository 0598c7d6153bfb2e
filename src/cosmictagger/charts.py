"""Line charts as SVG that takes its colours from the page: light or dark, small or large."""

import html
import math
from dataclasses import dataclass, field

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 8, 8, 40
MOST = 300
"""Points of a line; where there are more, means of neighbours are drawn, and between which values they lie."""


@dataclass(frozen=True)
class Line:
    """A line through points (x, y), in the page's colour a, b, c or d."""

    name: str
    colour: str
    points: list[tuple[float, float]]
    dashed: bool = False
    dots: bool = False
    """Mark each point."""


@dataclass(frozen=True)
class Chart:
    """Lines over common axes. `low` and `high`: ends of the upright axis; None: as the points have them."""

    lines: list[Line]
    across: str
    up: str
    low: float | None = 0.0
    high: float | None = None
    ends: tuple[float, float] | None = field(default=None)
    """Of the other axis."""

    def svg(self) -> str:
        """The chart, with a key beneath it. Points that are not finite are left out."""
        lines = [(line, [p for p in line.points if all(map(math.isfinite, p))]) for line in self.lines]
        every = [p for _, points in lines for p in points]
        if not every:
            return ""
        xs, ys = [x for x, _ in every], [y for _, y in every]
        x = _Axis(*(self.ends or (min(xs), max(xs))), LEFT, WIDTH - RIGHT)
        low, high = (min(ys) if self.low is None else self.low), (max(ys) if self.high is None else self.high)
        y = _Axis(low, high, HEIGHT - BOTTOM, TOP)
        drawn = "".join(_line(line, points, x, y) for line, points in lines if points)
        label = html.escape(f"{self.up} by {self.across}: {', '.join(line.name for line in self.lines)}")
        key = "".join(
            f'<span><i class="{line.colour}"></i>{html.escape(line.name)}</span>' for line, points in lines if points
        )
        return (
            f'<svg class="chart" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">'
            f"{self._axes(x, y)}{drawn}</svg>"
            f'<div class="key">{key}</div>'
        )

    def _axes(self, x: "_Axis", y: "_Axis") -> str:
        out = []
        for value in y.ticks(5):
            at = y(value)
            out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            out.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.6g}</text>')
        for value in x.ticks(6):
            out.append(f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:.6g}</text>')
        middle, upright = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
        out.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(self.across)}</text>')
        turned = f'text-anchor="middle" transform="translate(11 {upright}) rotate(-90)"'
        return "".join([*out, f"<text {turned}>{html.escape(self.up)}</text>"])


class _Axis:
    """From values to places."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        if not high > low:
            low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
        self.low, self.high, self._first, self._last = low, high, first, last

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self._first + share * (self._last - self._first)

    def ticks(self, about: int) -> list[float]:
        rough = (self.high - self.low) / about
        power = 10 ** math.floor(math.log10(rough))
        step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def _line(line: Line, points: list[tuple[float, float]], x: _Axis, y: _Axis) -> str:
    each = -(-len(points) // MOST)
    groups = [points[k : k + each] for k in range(0, len(points), each)]
    means = [tuple(sum(v) / len(group) for v in zip(*group, strict=True)) for group in groups]
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in means)
    out = ""
    if each > 1:
        above = [(x(m[0]), y(max(b for _, b in g))) for m, g in zip(means, groups, strict=True)]
        below = [(x(m[0]), y(min(b for _, b in g))) for m, g in zip(means, groups, strict=True)]
        edge = " ".join(f"{a:.1f},{b:.1f}" for a, b in [*above, *reversed(below)])
        out += f'<polygon class="band {line.colour}" points="{edge}"/>'
    out += f'<polyline class="line {line.colour}{" dashed" * line.dashed}" points="{path}"/>'
    if line.dots or len(points) == 1:
        out += "".join(f'<circle class="dot {line.colour}" r="3" cx="{x(a):.1f}" cy="{y(b):.1f}"/>' for a, b in means)
    return out
