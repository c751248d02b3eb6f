"""Numbers as people read them."""

import math

import pytest

from saex_pipe.common import numerals


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12.34, "12.3"),
        (0.01234, "0.0123"),
        (-0.5, "\N{MINUS SIGN}0.500"),
        (1234.4, "1,234"),
        (2.5e7, "2.50e+07"),
        (2.5e-5, "2.5e\N{MINUS SIGN}05"),
        (math.nan, "not a number"),
        (-math.inf, "\N{MINUS SIGN}∞"),
    ],
)
def test_short(value: float, text: str) -> None:
    assert numerals.short(value) == text


def test_percent_and_count() -> None:
    assert numerals.percent(0.1934) == "19.3 %"
    assert numerals.percent(4e-6) == "4.0e\N{MINUS SIGN}04 %"
    assert numerals.count(1234567) == "1,234,567"
