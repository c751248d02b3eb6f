"""Examples of a feature: text with each token shaded by how strongly the feature fires there."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from saex_pipe.common import numerals
from saex_pipe.common.formats.feature_cache import TOP_STRATUM
from saex_pipe.common.markup import Markup, join, tag

SHOWN_AT_ONCE = 8  # strongest examples that need no click

Example = Mapping[str, Any]  # a row of examples.parquet


def strata(examples: Sequence[Example], strongest: float) -> Markup:
    """All examples of one feature by stratum, the strongest first; ``strongest`` is its largest activation."""
    if not examples:
        return tag("p", "No examples: it never fires on the rows that were read.", class_="none")
    by_stratum = [(name, list(rows)) for name, rows in groupby(examples, key=lambda row: str(row["stratum"]))]
    by_stratum.sort(key=lambda item: _weakness(item[0]))
    return join(_stratum(name, rows, strongest) for name, rows in by_stratum)


def peak_tokens(examples: Sequence[Example], most: int = 4) -> list[str]:
    """The commonest tokens at the peaks of the strongest examples, as they first appear; none without text."""
    spelling: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for row in examples:
        at = row["position"] - row["context_start"]
        if row["stratum"] == TOP_STRATUM and 0 <= at < len(row["context_tokens"]):
            token = row["context_tokens"][at].strip(" ")
            if token:
                counts[spelling.setdefault(token.lower(), token)] += 1
    return [token for token, _ in counts.most_common(most)]


def _weakness(stratum: str) -> tuple[int, int, str]:
    """Sort key: "top", then the quantile bands from the strongest down, then anything else by name."""
    if stratum == TOP_STRATUM:
        return (0, 0, "")
    digits = stratum.removeprefix("q")
    return (1, -int(digits), "") if digits.isascii() and digits.isdigit() else (2, 0, stratum)


def _stratum(name: str, rows: list[Example], strongest: float) -> Markup:
    lines = [_example(row, strongest) for row in rows]
    if name == TOP_STRATUM:
        first = [tag("h3", "Strongest examples"), tag("ol", *lines[:SHOWN_AT_ONCE])]
        return join([*first, _folded(f"{len(lines) - SHOWN_AT_ONCE} more", lines[SHOWN_AT_ONCE:])])
    activations = [row["activation"] for row in rows]
    low, high = numerals.short(min(activations)), numerals.short(max(activations))
    reach = f"activation {low}" if low == high else f"activation {low} to {high}"
    return _folded(f"{len(rows)} from band {name}: {reach}", lines)


def _folded(summary: str, lines: list[Markup]) -> Markup:
    return tag("details", tag("summary", summary), tag("ol", *lines)) if lines else join([])


def _example(row: Example, strongest: float) -> Markup:
    peak = row["position"] - row["context_start"]
    activations = row["context_activations"]
    shades = _shades(activations, strongest)
    if any(row["context_tokens"]):
        body = tag("p", _shaded_text(row["context_tokens"], activations, shades, peak), class_="text", dir="auto")
    else:
        body = tag("p", _shaded_cells(activations, shades, peak), class_="cells")
    place = f"window {numerals.count(row['window'])}, token {numerals.count(row['position'])}"
    return tag("li", tag("span", numerals.short(row["activation"]), class_="act", title=place), body)


def _shades(activations: Sequence[float], strongest: float) -> list[float]:
    """Each activation as a share of the largest, in [0, 1]; what is not positive, or not a number, has no shade."""
    return [min(value / strongest, 1.0) if strongest > 0 and value > 0 else 0.0 for value in activations]


def _shaded_text(tokens: Sequence[str], activations: Sequence[float], shades: list[float], peak: int) -> Markup:
    """Tokens that fire are marked, the silent ones between them run together: pages stay small."""
    parts: list[str] = []
    for index, (token, value, shade) in enumerate(zip(tokens, activations, shades, strict=True)):
        if index == 0:
            token = token.lstrip(" ") or token
        if shade == 0 and index != peak:
            parts.append(token)
            continue
        # The space before a word stays outside its mark, or a line break there leaves a sliver of colour behind.
        word = token.lstrip(" ")
        parts.append(token[: len(token) - len(word)] if word else "")
        parts.append(_mark(word or token.replace(" ", "·") or "∅", value, shade, index == peak))
    return join(parts)


def _mark(token: str, value: float, shade: float, is_peak: bool) -> Markup:
    strength = f"--a:{shade:.2f}"
    return tag("mark", token, class_="peak" if is_peak else None, style=strength, data_v=numerals.short(value))


def _shaded_cells(activations: Sequence[float], shades: list[float], peak: int) -> Markup:
    """Without text, one cell a row."""
    cells = zip(activations, shades, strict=True)
    return join(
        _mark("", value, shade, index == peak) if shade > 0 or index == peak else tag("span")
        for index, (value, shade) in enumerate(cells)
    )
