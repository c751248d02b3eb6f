"""The bars of the histograms are where the numbers are."""

import re

import numpy as np
import pytest

from saex_pipe.stages.view import charts

BAR = re.compile(r'<rect class="(bar|bar shown)" x="([\d.]+)" y="[\d.]+" width="[\d.]+" height="([\d.]+)">')


def test_density_has_one_bar_a_filled_bin_with_its_count() -> None:
    rates_F = np.array([0, 0, 0.0015, 0.0016, 0.0012, 0.5], np.float32)
    svg = charts.density_histogram(rates_F, [2], "rows")
    bars = BAR.findall(svg)
    assert [kind for kind, _, _ in bars] == ["bar", "bar shown", "bar"]
    heights = [float(height) for _, _, height in bars]
    assert heights[0] == pytest.approx(3 * heights[2], abs=0.2)
    assert heights[1] == pytest.approx(heights[2], abs=0.2)
    assert "3 latents, 1 below" in svg
    # From 10^-3 to 1 in quarter decades: 0.0015 is in the first, 0.5 in the last but one of twelve bins.
    assert [float(x) for _, x, _ in bars] == [0.5, 0.5, 400.5]
    assert [text for text in ("10⁻³", "10⁻²", "10⁻¹", "fraction of rows") if text not in svg] == []


def test_activation_bars_grow_with_the_logarithm() -> None:
    svg = charts.activation_histogram([np.expm1(4), 0, np.expm1(2), np.expm1(0.001)], [0, 1, 2, 3, 4])
    heights = [float(height) for _, _, height in BAR.findall(svg)]
    assert len(heights) == 3
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    assert heights[2] == 1.5  # a rare bin stays visible


def test_empty_bins_at_the_ends_are_left_out() -> None:
    svg = charts.activation_histogram([0, 0, 3, 0, 1, 2, 0], [0.25, 0.5, 1, 2, 4, 8, 16, 32])
    assert [float(x) for _, x, _ in BAR.findall(svg)] == [0.5, 150.5, 225.5]
    assert re.findall("<text[^>]*>([^<]*)", svg) == ["1.00", "activation, log scale", "16.0"]
    even = charts.activation_histogram([1, 1, 1], [1, 2, 3, 4])
    assert re.findall("<text[^>]*>([^<]*)", even) == ["1.00", "activation", "4.00"]


def test_nothing_to_draw() -> None:
    assert "never fires" in charts.activation_histogram([0, 0], [0, 0, 0])
    assert "never fires" in charts.activation_histogram([], [])
    assert "No latent fires" in charts.density_histogram(np.zeros(4), [], "tokens")
    assert "<rect" in charts.density_histogram(np.ones(4), [], "tokens")
