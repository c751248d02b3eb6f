"""The report of a sweep: one row an SAE, and what each pays in latents for how well it reconstructs."""

from collections.abc import Mapping, Sequence
from typing import Any

from saex_pipe.common import numerals
from saex_pipe.common.charts import Point, scatter
from saex_pipe.common.report_page import charts, page, section, table

# Key of a member's scores: its head in the table, whether in percent.
_SCORES = {
    "l0": ("L0", False),
    "fvu": ("FVU", True),
    "ce_recovered": ("cross-entropy recovered", True),
    "dead_fraction": ("dead", True),
}


def sweep_report(members: Sequence[Mapping[str, Any]], title: str = "Sweep") -> str:
    """The page, self-contained.

    Args:
        members: one mapping an SAE: ``name`` (str), ``settings`` (its swept settings by name), and the scores ``l0``
            (latents per row), ``fvu``, ``ce_recovered`` and ``dead_fraction`` (fractions) as far as they are known;
            None stands for unknown.
        title: of the page.
    """
    names = list(dict.fromkeys(name for member in members for name in member["settings"]))
    scores = [key for key in _SCORES if any(member.get(key) is not None for member in members)]
    rows = [
        (
            member["name"],
            *(_setting(member["settings"].get(name)) for name in names),
            *(_score(key, member.get(key)) for key in scores),
        )
        for member in members
    ]
    plots = [
        scatter(
            name,
            "L0, latents that fire on a row",
            words,
            _points(members, key, more_is_better=more),
            more_is_better=more,
            logarithmic=True,
        )
        for key, name, words, more in (
            ("fvu", "Reconstruction", "fraction of the variance left unexplained", False),
            ("ce_recovered", "Language model", "fraction of its cross-entropy recovered", True),
        )
        if key in scores and "l0" in scores
    ]
    about = (
        f"{numerals.count(len(members))} SAEs. Filled points are on the Pareto front: no other SAE is at least as good "
        "in both respects and better in one."
    )
    heads = ("SAE", *names, *(_SCORES[key][0] for key in scores))
    return page(
        title, about, section("L0 against quality", charts(plots)), section("All", table(heads, rows, numbers=True))
    )


def pareto(pairs: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each pair is on the front where less is better in both: none other is no worse in both and not equal."""
    return [not any(x <= a and y <= b and (x, y) != (a, b) for x, y in pairs) for a, b in pairs]


def _points(members: Sequence[Mapping[str, Any]], key: str, *, more_is_better: bool) -> list[Point]:
    known = [member for member in members if member.get("l0") is not None and member.get(key) is not None]
    sign = -1.0 if more_is_better else 1.0
    front = pareto([(float(member["l0"]), sign * float(member[key])) for member in known])
    return [
        Point(
            float(member["l0"]),
            float(member[key]),
            ", ".join(_setting(value) for value in member["settings"].values()) or str(member["name"]),
            f"{member['name']}: L0 {_score('l0', member['l0'])}, {_SCORES[key][0]} {_score(key, member[key])}",
            best,
        )
        for member, best in zip(known, front, strict=True)
    ]


def _setting(value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _score(key: str, value: float | None) -> str:
    if value is None:
        return "\N{EN DASH}"
    return numerals.percent(value) if _SCORES[key][1] else numerals.short(value)
