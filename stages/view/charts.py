"""Histograms as inline SVG, coloured by the page's style sheet."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from saex_pipe.common import numerals
from saex_pipe.common.markup import Markup, join, tag

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BINS_PER_DECADE = 4


def activation_histogram(counts: Sequence[int], edges: Sequence[float]) -> Markup:
    """How often a feature fires how strongly, from the first filled bin to the last.

    Heights are logarithmic, since weak firing outnumbers strong by far.
    """
    if not counts or max(counts) == 0:
        return tag("p", "It never fires.", class_="none")
    filled = [index for index, value in enumerate(counts) if value > 0]
    counts, edges = counts[filled[0] : filled[-1] + 1], edges[filled[0] : filled[-1] + 2]
    width, height, floor = 300.0, 96.0, 78.0
    step = width / len(counts)
    tallest = math.log1p(max(counts))
    bars = []
    for index, value in enumerate(counts):
        bar = (floor - 4) * math.log1p(value) / tallest
        tip = f"{numerals.short(edges[index])} to {numerals.short(edges[index + 1])}: {numerals.count(value)}"
        bars.append(_bar(index * step, floor, step, bar, tip))
    labels = [
        _label(0, height - 4, numerals.short(edges[0]), "start"),
        _label(width / 2, height - 4, f"activation{', log scale' if _is_geometric(edges) else ''}", "middle"),
        _label(width, height - 4, numerals.short(edges[-1]), "end"),
    ]
    return _svg(width, height, [*bars, _axis(floor, width), *labels], "Histogram of positive activations")


def density_histogram(rates_F: np.ndarray, marked: Sequence[int], counted: str) -> Markup:
    """How many latents fire how often, over log10 of the firing rate (a fraction of the ``counted``).

    The ``marked`` latents have another colour.
    """
    alive = rates_F > 0
    if not alive.any():
        return tag("p", "No latent fires.", class_="none")
    exponents = np.log10(rates_F[alive].astype(np.float64))
    first = math.floor(exponents.min())
    edges = np.linspace(first, 0, -first * _BINS_PER_DECADE + 1) if first < 0 else np.array([-1.0, 0.0])
    counts = np.histogram(exponents, edges)[0]
    chosen = np.zeros(len(rates_F), bool)
    chosen[list(marked)] = True
    marked_counts = np.histogram(np.log10(rates_F[alive & chosen].astype(np.float64)), edges)[0]

    width, height, top, floor = 480.0, 190.0, 20.0, 150.0
    step = width / len(counts)
    tallest = int(counts.max())
    shapes = [_grid(y, width) for y in (top, (top + floor) / 2)]
    shapes.append(_label(0, top - 6, f"{numerals.count(tallest)} latents", "start"))
    for index, (value, of_them) in enumerate(zip(counts.tolist(), marked_counts.tolist(), strict=True)):
        low, high = 10.0 ** edges[index], 10.0 ** edges[index + 1]
        tip = f"{numerals.percent(low)} to {numerals.percent(high)}: {numerals.count(value)} latents, {of_them} below"
        x = index * step
        shapes.append(_bar(x, floor, step, (floor - top) * value / tallest, tip))
        shapes.append(_bar(x, floor, step, (floor - top) * of_them / tallest, tip, "bar shown"))
    shapes.append(_axis(floor, width))
    for exponent in range(first, 1):
        x = (exponent - edges[0]) / (edges[-1] - edges[0]) * width
        anchor = "start" if exponent == first else "end" if exponent == 0 else "middle"
        shapes.append(_label(x, floor + 17, _power(exponent), anchor))
    shapes.append(_label(width / 2, height - 4, f"fraction of {counted} on which a latent fires", "middle"))
    return _svg(width, height, shapes, "Histogram of the firing rates of all latents that fire")


def _is_geometric(edges: Sequence[float]) -> bool:
    """Whether bins that are drawn equally wide grow by a constant factor."""
    ratios = [high / low for low, high in pairwise(edges)] if edges[0] > 0 else []
    return len(ratios) > 1 and max(ratios) - min(ratios) < 1e-3 * max(ratios)


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else "10" + str(exponent).translate(_SUPERSCRIPTS)


def _svg(width: float, height: float, shapes: Sequence[Markup], title: str) -> Markup:
    return tag("svg", *shapes, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=title)


def _bar(x: float, floor: float, step: float, height: float, tip: str, kind: str = "bar") -> Markup:
    """One bar. A count of one stays visible beside thousands."""
    if height <= 0:
        return join([])
    height = max(height, 1.5)
    return tag(
        "rect",
        tag("title", tip),
        class_=kind,
        x=f"{x + 0.5:.1f}",
        y=f"{floor - height:.1f}",
        width=f"{max(step - 1, 0.5):.1f}",
        height=f"{height:.1f}",
    )


def _axis(y: float, width: float) -> Markup:
    return tag("line", class_="axis", x1=0, x2=width, y1=y, y2=y)


def _grid(y: float, width: float) -> Markup:
    return tag("line", class_="grid", x1=0, x2=width, y1=y, y2=y)


def _label(x: float, y: float, text: str, anchor: str) -> Markup:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)
