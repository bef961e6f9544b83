"""Charts as SVG: axes, points with errors both ways, curves with bands, labels that do not lie over each other.

Colours are classes (``s0`` to ``s7``, ``quiet``), so the page's style makes them light or dark. Coordinates are
rounded: the same numbers give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = 8
Span = tuple[float, float]
LETTER, LINE = 6.3, 14.0  # of a label, in pixels


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from low to high.

    >>> ticks(0.0, 1.0, 5), ticks(-3.0, 12.0, 4)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 5.0, 10.0])
    """
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(s * size for s in (1, 2, 5, 10) if s * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) + 0.0 for k in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Axis:
    """What is measured, and from where to where.

    Args:
        marks: (value, text) in place of round numbers.
    """

    title: str
    low: float
    high: float
    percent: bool = False
    marks: Sequence[tuple[float, str]] | None = None

    @classmethod
    def around(cls, title: str, values: Sequence[float], *, room: float = 0.06, percent: bool = False) -> Axis:
        """An axis that holds these values, with some room."""
        low, high = min(values), max(values)
        space = room * (high - low) or max(abs(high), 1.0) * 0.1
        return cls(title, low - space, high + space, percent)

    def words(self) -> list[tuple[float, str]]:
        if self.marks is not None:
            return list(self.marks)
        values = ticks(self.low, self.high)
        step = values[1] - values[0] if len(values) > 1 else 1.0
        shown = 100 * step if self.percent else step
        places = 0 if shown >= 1 else -math.floor(math.log10(shown) + 1e-9)
        return [(v, _tick(100 * v if self.percent else v, places)) for v in values]


def _tick(value: float, places: int) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g} k"
    return f"{value:.{places}f}".replace("-", "−")


@dataclass
class Panel:
    """One pair of axes within an SVG; draw in the order in which things should lie over each other."""

    x: Axis
    y: Axis
    left: float = 62
    top: float = 14
    width: float = 620
    height: float = 330
    shapes: list[str] = field(default_factory=list)
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)
    waiting: list[tuple[float, float, str, str]] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point; what lies outside is drawn at the border."""
        u = (min(max(x, self.x.low), self.x.high) - self.x.low) / (self.x.high - self.x.low)
        v = (min(max(y, self.y.low), self.y.high) - self.y.low) / (self.y.high - self.y.low)
        return self.left + u * self.width, self.top + (1 - v) * self.height

    def rule(self, y: float, text: str) -> None:
        """A line across, such as the start's level."""
        (x0, v), (x1, _) = self.at(self.x.low, y), self.at(self.x.high, y)
        self.shapes.append(f'<path class="rule" d="M{x0:.1f} {v:.1f}H{x1:.1f}"/>')
        if text:
            self.shapes.append(_text("hint", x1 - 4, v - 5, text, "end"))

    def curve(
        self, points: Sequence[Span], colour: str, *, dash: str = "", band: Sequence[Span | None] = (), name: str = ""
    ) -> None:
        """A line through points, over the band of their intervals."""
        spans = [(x, b) for (x, _), b in zip(points, band, strict=False) if b is not None]
        if len(spans) > 1:
            upper = [self.at(x, b[1]) for x, b in spans]
            lower = [self.at(x, b[0]) for x, b in reversed(spans)]
            self.shapes.append(f'<path class="band {colour}" d="{_path(upper + lower)}Z"/>')
        style = f' stroke-dasharray="{dash}"' if dash else ""
        self.shapes.append(f'<path class="curve {colour}"{style} d="{_path([self.at(*p) for p in points])}"/>')
        if name:
            self.waiting.append((*self.at(*points[-1]), name, colour))

    def point(
        self, x: float, y: float, colour: str, tip: str, *, x_span: Span | None = None, y_span: Span | None = None,
        name: str = "", hollow: bool = False, size: float = 4.5,
    ) -> None:  # fmt: skip
        """A point with its errors; its tip is shown on hover."""
        u, v = self.at(x, y)
        errors = ""
        if x_span:
            errors += f"M{self.at(x_span[0], y)[0]:.1f} {v:.1f}H{self.at(x_span[1], y)[0]:.1f}"
        if y_span:
            errors += f"M{u:.1f} {self.at(x, y_span[0])[1]:.1f}V{self.at(x, y_span[1])[1]:.1f}"
        drawn = f'<path class="error" d="{errors}"/>' if errors else ""
        kind = f"point {colour}{' hollow' if hollow else ''}"
        self.shapes.append(
            f'<g class="{kind}" data-tip="{_e(tip)}">{drawn}<circle cx="{u:.1f}" cy="{v:.1f}" r="{size:g}"/></g>'
        )
        self.taken.append((u - 6, v - 6, u + 6, v + 6))
        if name:
            self.waiting.append((u, v, name, colour))

    def labels(self, *, must: bool = False) -> None:
        """Write the names that wait, each where nothing else is; without room a name is left to its tip."""
        for u, v, whole, colour in self.waiting:
            name = whole if len(whole) <= 28 else f"{whole[:27]}…"
            wide = LETTER * len(name)
            places = [(8, 4), (-8 - wide, 4), (6, -9), (6, 17), (-6 - wide, -9), (-6 - wide, 17), (-wide / 2, -11)]
            places += [(8, 4 + sign * k * 7) for k in range(2, 9) for sign in (1, -1)] if must else []
            for du, dv in places:
                box = (u + du, v + dv - LINE + 4, u + du + wide, v + dv + 3)
                inside = self.left <= box[0] and box[2] <= self.left + self.width + (150 if must else 0)
                if inside and box[1] >= self.top - 8 and box[3] <= self.top + self.height + 4 and self._free(box):
                    self.taken.append(box)
                    self.shapes.append(_text(f"name {colour}", box[0], v + dv, name))
                    break
        self.waiting.clear()

    def _free(self, box: tuple[float, float, float, float]) -> bool:
        return all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in self.taken)

    def svg(self, *, below: bool = True) -> str:
        """The axes and what was drawn; `below`: with the words under the x axis."""
        bottom, right = self.top + self.height, self.left + self.width
        parts = []
        for value, text in self.y.words():
            v = self.at(self.x.low, value)[1]
            parts.append(f'<path class="grid" d="M{self.left:.1f} {v:.1f}H{right:.1f}"/>')
            parts.append(_text("tick", self.left - 8, v + 4, text, "end"))
        for value, text in self.x.words():
            u = self.at(value, self.y.low)[0]
            parts.append(f'<path class="grid" d="M{u:.1f} {self.top:.1f}V{bottom:.1f}"/>')
            if below:
                parts.append(_text("tick", u, bottom + 18, text, "middle"))
        parts.append(f'<path class="axis" d="M{self.left:.1f} {self.top:.1f}V{bottom:.1f}H{right:.1f}"/>')
        middle = self.top + self.height / 2
        parts.append(
            f'<text class="title" transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">'
            f"{_e(self.y.title)}</text>"
        )
        if below:
            parts.append(_text("title", self.left + self.width / 2, bottom + 40, self.x.title, "middle"))
        return "".join([*parts, *self.shapes])


def drawing(panels: Sequence[Panel], said: str, *, right: float = 26) -> str:
    """Panels one above the other as one SVG; `said`: what it shows, for those who cannot see it."""
    last = panels[-1]
    width, height = last.left + last.width + right, last.top + last.height + 50
    inside = "".join(p.svg(below=p is last) for p in panels)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_e(said)}" '
        f'xmlns="http://www.w3.org/2000/svg">{inside}</svg>'
    )


def colour(index: int) -> tuple[str, str]:
    """The class of the index-th series, and its dashes: after all colours they come again, dashed."""
    return f"s{index % COLOURS}", ("", "7 4", "2 4")[index // COLOURS % 3]


def _path(points: Sequence[Span]) -> str:
    return "M" + "L".join(f"{u:.1f} {v:.1f}" for u, v in points)


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_e(text)}</text>'


def _e(text: str) -> str:
    return escape(text, quote=True)
