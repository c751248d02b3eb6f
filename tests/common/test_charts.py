"""Charts put values where their axes say, and their axes end at round numbers."""

import math
import re

import pytest

from saex_pipe.common.charts import HEIGHT, WIDTH, Axis, Point, Series, bars, heat_map, lines, scatter


@pytest.mark.parametrize(
    ("values", "settings", "ends", "ticks"),
    [
        ([3, 17], {}, (0, 20), [0, 5, 10, 15, 20]),
        ([30.5, 33.0], {}, (30.5, 33), [30.5, 31, 31.5, 32, 32.5, 33]),
        ([31.0, 33.0], {"from_zero": True}, (0, 40), [0, 10, 20, 30, 40]),
        ([7.0], {}, (2, 12), [2, 4, 6, 8, 10, 12]),
        ([], {}, (0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([0.18, 0.95], {"logarithmic": True}, (0.1, 1), [0.1, 0.2, 0.5, 1]),
        ([0.25, 0.0, -3.0, math.nan], {"logarithmic": True}, (0.2, 0.5), [0.2, 0.5]),
        ([1e-6, 1.0], {"logarithmic": True}, (1e-6, 1), [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]),
    ],
)
def test_axes_end_at_round_numbers(values, settings, ends, ticks):
    axis = Axis.of(values, **settings)
    assert (axis.low, axis.high) == pytest.approx(ends, abs=1e-12)
    assert axis.ticks() == pytest.approx(ticks, abs=1e-12)


@pytest.mark.parametrize("value", [1e-9, 0.003, 1.0, 7.0, 123456.0])
def test_a_single_value_has_an_axis_of_either_kind(value):
    for logarithmic in (False, True):
        axis = Axis.of([value], logarithmic=logarithmic)
        assert axis.low <= value * (1 + 1e-9)
        assert axis.high >= value * (1 - 1e-9)
        assert 2 <= len(axis.ticks()) <= 11


def test_places_on_an_axis():
    assert Axis(10.0, 20.0).share(12.5) == 0.25
    assert Axis(0.01, 1.0, logarithmic=True).share(0.1) == pytest.approx(0.5)
    assert Axis(0.01, 1.0, logarithmic=True).share(0.0) is None
    assert Axis(0.0, 1.0).share(math.inf) is None


def path_of(markup, kind):
    (path,) = re.findall(rf'<path d="([^"]*)" class="{kind}"', markup)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_a_line_goes_through_its_points_and_leaves_out_what_cannot_be_shown():
    markup = lines("Loss", "rows", [Series("a", [(0, 0), (5, 10), (7, math.nan), (10, 20)])])
    (x0, y0), (x1, y1), (x2, y2) = path_of(markup, "line s0")
    assert (x1 - x0, y1 - y0) == pytest.approx((x2 - x1, y2 - y1))
    assert x0 < x1
    assert y0 > y1, "up is more"
    assert "legend" not in markup


def test_several_lines_have_a_legend_and_text_is_escaped():
    markup = lines("<b>", "rows", [Series("a", [(1, 1)]), Series("b & c", [(1, 2)])])
    assert "<b>" not in markup
    assert markup.count('class="key s') == 2
    assert "b &amp; c" in markup


def test_a_scatter_joins_its_front_in_order():
    points = [Point(x, y, f"k={x}", "tip", best) for x, y, best in [(64, 1, True), (8, 5, True), (16, 9, False)]]
    markup = scatter("t", "L0", "FVU", points, more_is_better=False, logarithmic=True)
    (x0, y0), (x1, y1) = path_of(markup, "front")
    assert x0 < x1
    assert y0 < y1, "8 has the larger FVU and is the higher"
    assert markup.count('class="point best"') == 2
    assert markup.count('class="point"') == 1
    assert "k=16" not in re.sub("<title>.*?</title>", "", markup), "only the front is labelled"


def test_bars_and_cells_fill_the_chart_in_proportion():
    markup = bars("t", "x", [0.0, 1.0, 2.0, 3.0], [5, 0, 10], lambda i: f"bin {i}")
    heights = [float(height) for height in re.findall(r'class="bar"[^>]* height="([\d.]+)"', markup)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert len(heights) == 2
    markup = heat_map("t", "x", [0, 10, 20], [0.0, 1.0, 2.0], [[0.25, 0.0], [0.0, 1.0]], lambda i, j: f"{i} {j}")
    cells = re.findall(r'<rect class="cell" fill-opacity="([\d.]+)" x="([\d.]+)" y="([\d.]+)"', markup)
    (weak, x0, y0), (strong, x1, y1) = [tuple(map(float, cell)) for cell in cells]
    assert (weak, strong) == (0.5, 1.0)
    assert 0 < x0 < x1 < WIDTH
    assert 0 < y1 < y0 < HEIGHT
