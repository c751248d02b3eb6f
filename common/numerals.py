"""Numbers as people read them."""

import math

MINUS = "\N{MINUS SIGN}"


def count(value: int) -> str:
    """``1234567`` as ``1,234,567``."""
    return f"{value:,}"


def short(value: float) -> str:
    """Three significant digits, without an exponent where that stays readable: ``0.0123``, ``12.3``, ``1,234``."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else f"{MINUS}∞")
    size = abs(value)
    if size >= 1000:
        text = f"{value:,.0f}" if size < 1e6 else f"{value:.2e}"
    elif size >= 0.001 or size == 0:
        decimals = 0 if size == 0 else max(0, 2 - math.floor(math.log10(size)))
        text = f"{value:.{decimals}f}"
    else:
        text = f"{value:.1e}"
    return text.replace("-", MINUS)


def percent(fraction: float) -> str:
    """A fraction in percent: ``0.0123`` as ``1.23 %``, and never ``0 %`` for what is not zero."""
    return f"{short(100 * fraction)} %"
