"""Charts as inline SVG, coloured by the style sheet of ``report_page``: lines, points, bars, a map of heat."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from saex_pipe.common import numerals
from saex_pipe.common.markup import Markup, join, tag

WIDTH, HEIGHT = 480.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 12.0, 10.0, 42.0
_MOST_TICKS = 5
_DECADES_ALL_LABELLED = 7
_DECADES_FINE = 2.5  # up to here 2 and 5 are marked as well


@dataclass(frozen=True)
class Axis:
    """From values to places along one side of a chart."""

    low: float
    high: float
    logarithmic: bool = False

    @staticmethod
    def of(values: Sequence[float], *, logarithmic: bool = False, from_zero: bool = False) -> "Axis":
        """An axis that shows all finite ``values`` (above 0 if logarithmic), with ends at round numbers."""
        found = [v for v in values if math.isfinite(v) and (v > 0 or not logarithmic)]
        low, high = (min(found), max(found)) if found else (0.1, 1.0)
        if logarithmic:
            low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high * 1.01))
            near = [step for step in _steps(low, high) if step * 0.999 <= min(found, default=low)]
            far = [step for step in _steps(low, high) if step * 1.001 >= max(found, default=high)]
            return Axis(near[-1], far[0] if far[0] > near[-1] else high, True)
        low = min(low, 0.0) if from_zero else low
        if high <= low:
            low, high = low - abs(low) / 2, high + (abs(high) / 2 or 1.0)
        step = _round_step((high - low) / _MOST_TICKS)
        return Axis(step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9))

    def share(self, value: float) -> float | None:
        """Where ``value`` lies, 0 at the low end and 1 at the high one; None where it cannot be shown."""
        if not math.isfinite(value) or (self.logarithmic and value <= 0):
            return None
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values."""
        if not self.logarithmic:
            step = _round_step((self.high - self.low) / _MOST_TICKS)
            return [self.low + i * step for i in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]
        decades = math.log10(self.high / self.low)
        steps = [step for step in _steps(self.low, self.high) if self.low * 0.999 <= step <= self.high * 1.001]
        if decades <= _DECADES_FINE:
            return steps
        powers = [step for step in steps if abs(math.log10(step) - round(math.log10(step))) < 1e-6]
        return powers[:: math.ceil(len(powers) / _DECADES_ALL_LABELLED)]


class Series(NamedTuple):
    """A line through points in the order given, or points alone. Values that are not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]


class Point(NamedTuple):
    """One mark of a scatter chart."""

    x: float
    y: float
    label: str
    tip: str
    best: bool  # on the front: joined with the others that are


def lines(title: str, x_label: str, series: Sequence[Series], *, logarithmic: bool = False) -> Markup:
    """Series over one x-axis, with a legend where there are several. The y-axis starts at 0 unless logarithmic."""
    x = Axis(0.0, max((px for one in series for px, _ in one.points), default=0.0) or 1.0)
    y = Axis.of([py for one in series for _, py in one.points], logarithmic=logarithmic, from_zero=True)
    shapes = [*_frame(x, y, x_label)]
    for number, one in enumerate(series):
        places = [(px, py, p) for px, py in one.points if (p := _place(x, y, px, py)) is not None]
        path = " ".join(f"{'M' if i == 0 else 'L'}{at[0]:.1f} {at[1]:.1f}" for i, (_, _, at) in enumerate(places))
        if path:
            shapes.append(tag("path", d=path, class_=f"line s{number}"))
        for px, py, at in places[-1:]:
            shapes.append(_dot(at, 3, f"s{number}", f"{one.name} {numerals.short(py)} at {numerals.short(px)}"))
    return _figure(title, _svg(shapes, title), _legend([one.name for one in series]) if len(series) > 1 else join([]))


def scatter(
    title: str, x_label: str, y_label: str, points: Sequence[Point], *, more_is_better: bool, logarithmic: bool = False
) -> Markup:
    """Points; those on the front (less of x, and more or less of y) are filled, joined and labelled.

    ``logarithmic`` is said of the x-axis.
    """
    heights = [p.y for p in points if math.isfinite(p.y)]
    margin = 0.08 * (max(heights, default=0.0) - min(heights, default=0.0))  # for labels
    x = Axis.of([p.x for p in points], logarithmic=logarithmic)
    y = Axis.of([*heights, *(v - margin for v in heights), *(v + margin for v in heights)])
    front = sorted((p for p in points if p.best), key=lambda p: (p.x, p.y))
    joined = " ".join(f"{'L' if i else 'M'}{at[0]:.1f} {at[1]:.1f}" for i, at in enumerate(_places(x, y, front)))
    shapes = [*_frame(x, y, x_label), tag("path", d=joined, class_="front") if joined else join([])]
    for point in points:
        at = _place(x, y, point.x, point.y)
        if at is None:
            continue
        kind = "point best" if point.best else "point"
        shapes.append(_dot(at, 4.5, kind, point.tip))
        if point.best:  # nothing lies to the left of the front and on its better side
            left, up = at[0] > (_LEFT + WIDTH) / 2, (at[0] > (_LEFT + WIDTH) / 2) == more_is_better
            beside = at[0] + (-7 if left else 9)
            shapes.append(_label(beside, at[1] + (-7 if up else 15), point.label, "end" if left else "start"))
    return _figure(f"{title}: {y_label}", _svg(shapes, title))


def bars(title: str, x_label: str, edges: Sequence[float], counts: Sequence[int], tip: Callable[[int], str]) -> Markup:
    """A histogram over equal bins."""
    x, y = Axis(edges[0], edges[-1]), Axis.of([0, *counts], from_zero=True)
    shapes = [*_frame(x, y, x_label)]
    for i, count in enumerate(counts):
        left, right = (_across(x, edge) for edge in edges[i : i + 2])
        shapes.append(_box(left, right, _up(y, count), HEIGHT - _BOTTOM, tip(i), "bar") if count else join([]))
    return _figure(title, _svg(shapes, title))


def heat_map(
    title: str,
    x_label: str,
    x_edges: Sequence[float],
    y_edges: Sequence[float],
    columns: Sequence[Sequence[float]],
    tip: Callable[[int, int], str],
) -> Markup:
    """Shares, 0 to 1, a column of them between every two ``x_edges``; the opacity goes by their square roots."""
    x, y = Axis(x_edges[0], x_edges[-1]), Axis(y_edges[0], y_edges[-1])
    most = max((value for column in columns for value in column), default=0.0) or 1.0
    cells = []
    for i, column in enumerate(columns):
        left, right = _across(x, x_edges[i]), _across(x, x_edges[i + 1])
        for j, value in enumerate(column):
            if value > 0:
                top, floor = _up(y, y_edges[j + 1]), _up(y, y_edges[j])
                cells.append(_box(left, right, top, floor, tip(i, j), "cell", f"{math.sqrt(value / most):.3f}"))
    return _figure(title, _svg([*_frame(x, y, x_label), *cells], title))


def _steps(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from that of ``low`` to that of ``high``."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return [factor * 10.0**exponent for exponent in range(first, last + 1) for factor in (1, 2, 5)]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is at least ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def _across(x: Axis, value: float) -> float:
    return _LEFT + (x.share(value) or 0.0) * (WIDTH - _LEFT - _RIGHT)


def _up(y: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - (y.share(value) or 0.0) * (HEIGHT - _TOP - _BOTTOM)


def _place(x: Axis, y: Axis, at_x: float, at_y: float) -> tuple[float, float] | None:
    return None if x.share(at_x) is None or y.share(at_y) is None else (_across(x, at_x), _up(y, at_y))


def _places(x: Axis, y: Axis, points: Sequence[Point]) -> list[tuple[float, float]]:
    return [at for point in points if (at := _place(x, y, point.x, point.y)) is not None]


def _frame(x: Axis, y: Axis, x_label: str) -> Iterator[Markup]:
    """Grid, axis and numbers."""
    floor = HEIGHT - _BOTTOM
    for value in y.ticks():
        up = _up(y, value)
        yield tag("line", class_="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=f"{up:.1f}", y2=f"{up:.1f}")
        yield _label(_LEFT - 8, up + 4, _tick(value), "end")
    yield tag("line", class_="axis", x1=_LEFT, x2=WIDTH - _RIGHT, y1=floor, y2=floor)
    for value in x.ticks():
        yield _label(_across(x, value), floor + 16, _tick(value), "middle")
    yield _label((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, x_label, "middle")


def _tick(value: float) -> str:
    """As short as it can be: ``250k``, ``0.05``, ``1e-5``."""
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{name}".replace("-", numerals.MINUS)
    text = f"{value:.3g}" if size >= 1e-3 else "0" if size < 1e-12 else f"{value:.0e}".replace("e-0", "e-")
    return text.replace("-", numerals.MINUS)


def _svg(shapes: Sequence[Markup], title: str) -> Markup:
    return tag("svg", *shapes, viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", role="img", aria_label=title)


def _figure(title: str, *inside: Markup) -> Markup:
    return tag("figure", tag("figcaption", title), *inside)


def _legend(names: Sequence[str]) -> Markup:
    return tag("p", *(tag("span", name, class_=f"key s{number}") for number, name in enumerate(names)), class_="legend")


def _box(
    left: float, right: float, top: float, floor: float, tip: str, kind: str, opacity: str | None = None
) -> Markup:
    return tag(
        "rect",
        tag("title", tip),
        class_=kind,
        fill_opacity=opacity,
        x=f"{left + 0.5:.1f}",
        y=f"{top:.1f}",
        width=f"{max(right - left - 1, 0.5):.1f}",
        height=f"{max(floor - top, 1.0):.1f}",
    )


def _dot(at: tuple[float, float], radius: float, kind: str, tip: str) -> Markup:
    return tag("circle", tag("title", tip), class_=kind, cx=f"{at[0]:.1f}", cy=f"{at[1]:.1f}", r=radius)


def _label(x: float, y: float, text: str, anchor: str) -> Markup:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)
