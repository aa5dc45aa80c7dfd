"""Line charts as inline SVG: crisp at every size, text that can be selected, colours from the page's style.

A chart is drawn on 400 by 290 units, so that its text is read on a phone as on a screen. Lines differ in their dashes
as in their colours. Every chart has a title and a description; the numbers stand in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from dpbudget.report.html import Safe, join, tag

WIDTH, HEIGHT = 400.0, 290.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 60.0, 380.0, 12.0, 246.0
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A scale from ``low`` to ``high`` with its ticks as (value, text).

    Attributes:
        logarithmic: positions follow the logarithm; values must be positive.
    """

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where the value lies, 0 at ``low`` and 1 at ``high``; values outside are put at the end."""
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def linear_axis(label: str, high: float, *, low: float = 0.0, show: Callable[[float], str] | None = None) -> Axis:
    """From ``low`` to at least ``high`` in steps of 1, 2 or 5 times a power of ten, about five of them."""
    span = max(high - low, 1e-300)
    power = 10.0 ** math.floor(math.log10(span / 5.0))
    step = next(power * factor for factor in (1.0, 2.0, 5.0, 10.0) if span / (power * factor) <= 5.0)
    count = math.ceil(span / step - 1e-9)
    values = [low + step * i for i in range(count + 1)]
    text = show or (lambda value: f"{value:.4g}")
    return Axis(label, low, values[-1], tuple((value, text(value)) for value in values))


def logarithmic_axis(label: str, low: float, high: float) -> Axis:
    """Between powers of ten, with at most six ticks."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    every = max(1, math.ceil((last - first) / 6))
    powers = range(last, first - 1, -every)
    ticks = tuple((10.0**k, f"10{str(k).translate(_SUPERSCRIPTS)}" if k else "1") for k in powers)
    return Axis(label, 10.0**first, 10.0**last, ticks, logarithmic=True)


@dataclass
class Chart:
    """A chart that grows by its marks.

    Attributes:
        name: prefix of its ids, unique in the page.
        title, description: what a screen reader says of it.
    """

    name: str
    title: str
    description: str
    x: Axis
    y: Axis
    _marks: list[Safe] = field(default_factory=list)

    def line(self, points: Iterable[Point], style: str) -> None:
        """A line through points in order of x, ended where it leaves the chart below."""
        kept = list(points)
        for index, (before, after) in enumerate(pairwise(kept)):
            if before[1] < self.y.low and after[1] < self.y.low:
                kept = kept[: index + 1]
                break
        if len(kept) > 1:
            self._marks.append(tag("polyline", points=self._places(kept), class_=f"line {style}"))

    def stairs(self, points: Sequence[Point], style: str, *, early: bool = False) -> None:
        """A line that keeps the value of each point until the next one; ``early`` takes the next one's value at once.

        Between two bounds of something that grows, the next one holds and a straight line would not.
        """
        corners = [points[0]] if points else []
        for before, after in pairwise(points):
            corners += [(before[0], after[1]) if early else (after[0], before[1]), after]
        self.line(corners, style)

    def area_below(self, points: Sequence[Point], style: str) -> None:
        """The region between a line and the bottom of the chart."""
        if len(points) > 1:
            ends = [(points[-1][0], self.y.low), (points[0][0], self.y.low)]
            self._marks.append(tag("polygon", points=self._places([*points, *ends]), class_=style))

    def dot(self, at: Point, text: str) -> None:
        """A point of a falling line, named where the line leaves room: above it, to the right."""
        x, y = self._place(at)
        self._marks.append(tag("circle", cx=x, cy=y, r=4.0, class_="dot"))
        self._marks.append(tag("text", text, x=x + 7, y=max(y - 7, _TOP + 10), class_="note"))

    def note(self, at: Point, text: str) -> None:
        """Words inside the chart, centred."""
        x, y = self._place(at)
        self._marks.append(tag("text", text, x=x, y=y, class_="middle note"))

    def svg(self) -> Safe:
        """The element."""
        ids = {"title": f"{self.name}-title", "desc": f"{self.name}-desc"}
        return tag(
            "svg",
            tag("title", self.title, id=ids["title"]),
            tag("desc", self.description, id=ids["desc"]),
            self._axes(),
            *self._marks,
            viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
            role="img",
            aria_labelledby=ids["title"],
            aria_describedby=ids["desc"],
            class_="chart",
        )

    def _axes(self) -> Safe:
        parts = []
        for value, text in self.x.ticks:
            x, _ = self._place((value, self.y.low))
            parts.append(tag("line", x1=x, x2=x, y1=_TOP, y2=_BOTTOM, class_="grid"))
            parts.append(tag("text", text, x=x, y=_BOTTOM + 17, class_="middle"))
        for value, text in self.y.ticks:
            _, y = self._place((self.x.low, value))
            parts.append(tag("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, class_="grid"))
            parts.append(tag("text", text, x=_LEFT - 7, y=y + 4, class_="end"))
        parts.append(tag("line", x1=_LEFT, x2=_RIGHT, y1=_BOTTOM, y2=_BOTTOM, class_="axis"))
        parts.append(tag("text", self.x.label, x=(_LEFT + _RIGHT) / 2, y=HEIGHT - 8, class_="middle label"))
        middle = (_TOP + _BOTTOM) / 2
        turned = f"rotate(-90 11 {middle:g})"
        parts.append(tag("text", self.y.label, x=11.0, y=middle, transform=turned, class_="middle label"))
        return join(*parts)

    def _place(self, point: Point) -> Point:
        x, y = self.x.share(point[0]), self.y.share(point[1])
        return _LEFT + (_RIGHT - _LEFT) * x, _BOTTOM - (_BOTTOM - _TOP) * y

    def _places(self, points: Iterable[Point]) -> str:
        return " ".join(f"{x:.2f},{y:.2f}" for x, y in map(self._place, points))


def bar(share: float, text: str) -> Safe:
    """A horizontal bar that is filled to ``share``; its text stands beside it for those who see no bar."""
    filled = 100.0 * min(max(share, 0.0), 1.0)
    return tag(
        "svg",
        tag("title", text),
        tag("rect", x=0.0, y=0.0, width="100", height="8", class_="track"),
        tag("rect", x=0.0, y=0.0, width=filled, height="8", class_="filled") if filled > 0 else None,
        viewBox="0 0 100 8",
        preserveAspectRatio="none",
        role="img",
        class_="bar",
    )
