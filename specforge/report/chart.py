"""Charts as SVG: a frame with ticks and units, and in it lines, bands, points and bars of classes that the style sheet colours.

A class `r3` says that something belongs to run number 3, `n3` that it is the n-gram drafter on the rows of that run; what belongs to
no run that is shown is hidden.
All coordinates are units of a view box of 360 by 236, which a phone shows at full size.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from specforge.report.marks import outline
from specforge.report.markup import Markup, element, join

WIDTH, HEIGHT = 360.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 22.0, 40.0
Point = tuple[float, float]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers of a step of 1, 2 or 5 times a power of ten that lie in [low, high]."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def plain(value: float) -> str:
    """A number for an axis: 12,300 or 0.25."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def short(value: float) -> str:
    """A number for the narrow margin of an axis: 120k for 120,000."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    return f"{value / 1e3:.4g}k" if abs(value) >= 1e4 else plain(value)


@dataclass
class Chart:
    """One frame. `x` and `y` are the ends of the axes; what is drawn is kept in order."""

    title: str
    x_label: str
    y_label: str
    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: Sequence[tuple[float, str]] | None = None
    """Places and words; None: round numbers."""
    height: float = HEIGHT
    left: float = LEFT
    right: float = RIGHT
    _parts: list[Markup] = field(default_factory=list)
    _series: list[dict[str, object]] = field(default_factory=list)

    def at(self, point: Point) -> Point:
        """Where a value lies in the picture."""
        x, y = point
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        return self.left + across * (WIDTH - self.left - self.right), self.height - BOTTOM - up * (self.height - TOP - BOTTOM)

    def line(self, points: Sequence[Point], classes: str, name: str = "", digits: int = 3) -> None:
        """A line; with a `name` the pointer finds its values."""
        if points:
            path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, points))
            self._parts.append(element("path", d=path, class_=f"line {classes}".strip()))
        if points and name:
            shown = [[*(round(place, 1) for place in self.at(point)), plain(point[0]), f"{point[1]:,.{digits}f}"] for point in points]
            self._series.append({"name": name, "class": classes, "points": shown})

    def level(self, value: float, classes: str, name: str) -> None:
        """A line all across for what has one value, which the pointer finds everywhere."""
        self.line([(x, value) for x in self.x], classes)
        self._series.append({"name": name, "class": classes, "level": f"{value:.3f}", "points": []})

    def band(self, lows: Sequence[Point], highs: Sequence[Point], classes: str) -> None:
        if lows:
            path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, [*lows, *reversed(highs)])) + "Z"
            self._parts.append(element("path", d=path, class_=f"band {classes}"))

    def dots(self, points: Sequence[Point], run: int, style: str = "", radius: float = 3.0, tips: Sequence[str] = ()) -> None:
        """The shape of the run at each of the points."""
        for number, point in enumerate(points):
            tip = tips[number] if tips else None
            self._parts.append(element("path", d=outline(run, *self.at(point), radius), class_=f"dot r{run} {style}".strip(), data_tip=tip))

    def stroke(self, begin: Point, end: Point, classes: str, tip: str | None = None) -> None:
        (x1, y1), (x2, y2) = self.at(begin), self.at(end)
        self._parts.append(element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=f"stroke {classes}", data_tip=tip))

    def bar(self, left: float, right: float, value: float, classes: str, tip: str) -> None:
        x1, top = self.at((left, value))
        x2, bottom = self.at((right, self.y[0]))
        self._parts.append(
            element("rect", x=x1, y=top, width=x2 - x1, height=max(bottom - top, 0.5), rx=1.0, class_=f"bar {classes}", data_tip=tip)
        )

    def mark(self, x: float, y: float, classes: str, tip: str) -> None:
        """A short upright line at a place of the picture."""
        self._parts.append(element("line", x1=x, y1=y - 5, x2=x, y2=y + 5, class_=f"stroke {classes}", data_tip=tip))

    def words(self, x: float, y: float, text: str, classes: str) -> None:
        """Text at a place of the picture, not of the axes."""
        self._parts.append(element("text", text, x=x, y=y, class_=classes))

    def svg(self, summary: str) -> Markup:
        """The picture; `summary` says in words what it shows, for those who do not see it."""
        data = json.dumps(self._series) if self._series else None
        return element(
            "svg", self._frame(), *self._parts, element("g", class_="cursor"), viewBox=f"0 0 {WIDTH:g} {self.height:g}", role="img",
            aria_label=f"{self.title}. {summary}", data_series=data, data_x=self.x_label, tabindex="0" if data else None,
        )  # fmt: skip

    def _frame(self) -> Markup:
        left, bottom = self.at((self.x[0], self.y[0]))
        right, _ = self.at((self.x[1], self.y[1]))
        drawn: list[Markup | None] = []
        for value in ticks(*self.y) if self.y_label else ():
            _, y = self.at((self.x[0], value))
            drawn.append(element("line", x1=left, y1=y, x2=right, y2=y, class_="grid"))
            drawn.append(element("text", short(value), x=left - 7, y=y + 3.5, class_="tick end"))
        for value, word in self.x_ticks if self.x_ticks is not None else [(value, plain(value)) for value in ticks(*self.x)]:
            x, _ = self.at((value, self.y[0]))
            drawn.append(element("line", x1=x, y1=bottom, x2=x, y2=bottom + 4, class_="axis"))
            drawn.append(element("text", word, x=x, y=bottom + 16, class_="tick middle"))
        drawn.append(element("line", x1=left, y1=bottom, x2=right, y2=bottom, class_="axis"))
        drawn.append(element("text", self.y_label, x=2.0, y=10.0, class_="label") if self.y_label else None)
        drawn.append(element("text", self.x_label, x=right, y=self.height - 6, class_="label end"))
        return join(*drawn)


def around(values: Sequence[float], low: float | None = None, high: float | None = None) -> tuple[float, float]:
    """Ends of an axis that show all values with a little room; `low` and `high` are ends that are given."""
    finite = [value for value in values if math.isfinite(value)]
    least, most = min(finite, default=0.0), max(finite, default=1.0)
    room = (most - least) * 0.06 or abs(most) * 0.1 or 1.0
    return (least - room if low is None else low), (most + room if high is None else high)
