"""The report of a training: curves over rows, how often latents fire over time, final numbers, settings.

Made of nothing but the events in ``metrics.jsonl`` and the facts of the manifest, so that it can be made again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from saex_pipe.common import numerals
from saex_pipe.common.charts import Series, bars, heat_map, lines
from saex_pipe.common.markup import Markup, tag
from saex_pipe.common.report_page import charts, page, section, table, tiles

REPORT = "report.html"
_X = "rows"
_FIRING = "firing_frequency_log10"
# Title, terms in one chart by their names in events, whether the axis is logarithmic.
_CURVES: tuple[tuple[str, Mapping[str, str], bool], ...] = (
    (
        "Loss",
        {"loss": "total", "reconstruction": "reconstruction", "sparsity": "sparsity", "auxiliary": "auxiliary"},
        True,
    ),
    ("FVU, fraction of the variance of a batch left unexplained", {"fvu": "FVU"}, True),
    ("L0, latents that fire on a row", {"l0": "L0"}, False),
    ("Dead latents, share of all", {"dead_fraction": "dead"}, False),
    ("Norm of the gradient before clipping", {"gradient_norm": "norm"}, True),
    ("Learning rate", {"learning_rate": "learning rate"}, False),
    ("Rows a second since the process began", {"rows_per_second": "rows/s"}, False),
    ("Use of the device", {"mfu": "MFU", "waiting_share": "share of the time waiting for data"}, False),
)
_NUMBERS = ("l0", "fvu", "dead_fraction", "loss")
_NAMES = {"l0": "L0", "fvu": "FVU", "dead_fraction": "Dead", "loss": "Loss"}
_IN_PERCENT = ("fvu", "dead_fraction")


class Facts(NamedTuple):
    """What the manifest of a training says of it."""

    uri: str
    config: Mapping[str, Any]
    contents: Mapping[str, Any]
    totals: Mapping[str, Any]


def read_events(data: bytes) -> list[dict[str, Any]]:
    """The events of a ``metrics.jsonl``. A last line that a kill has cut off is left out."""
    found = []
    for line in data.splitlines():
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def report(facts: Facts, events: Iterable[Mapping[str, Any]]) -> str:
    """The page. Of steps that were done again after a kill the last events count."""
    batch_rows = int(facts.config["batch_rows"])
    curve: dict[int, dict[str, float]] = {}
    firing: dict[int, Mapping[str, Any]] = {}
    for event in events:
        if "step" not in event:
            continue
        rows = int(event["step"]) * batch_rows
        if _FIRING in event:
            firing[rows] = event[_FIRING]
        else:
            curve[rows] = {name: value for name, value in event.items() if isinstance(value, int | float)}
    variant, latents = facts.contents["variant"], facts.contents["latents"]
    title = f"Training of a {variant} with {numerals.count(latents)} latents"
    about = (
        f"{facts.uri}: {numerals.count(facts.totals['rows'])} rows in {numerals.count(facts.totals['steps'])} steps. "
        "Curves show single batches before their update; a latent is dead after "
        f"{numerals.count(int(facts.config['dead_after_rows']))} rows without firing."
    )
    last = {**facts.contents["last_step"], "loss": facts.contents["last_step"]["total"]}
    last["dead_fraction"] = facts.contents["dead_fraction"]
    return page(
        title,
        about,
        tiles((_NAMES[name], _number(name, last[name])) for name in _NUMBERS),
        section("Over the rows", charts(_curves(dict(sorted(curve.items()))))),
        section("How often latents fire", *_firing(dict(sorted(firing.items())))),
        section("Settings", table((), _settings(facts.config))),
    )


def _number(name: str, value: float) -> str:
    return numerals.percent(value) if name in _IN_PERCENT else numerals.short(value)


def _curves(curve: Mapping[int, Mapping[str, float]]) -> list[Markup]:
    figures = []
    for title, terms, logarithmic in _CURVES:
        series = [
            Series(name, [(float(rows), values[term]) for rows, values in curve.items() if term in values])
            for term, name in terms.items()
        ]
        shown = [one for one in series if any(value != 0 for _, value in one.points)]
        if not shown:  # known, and 0 throughout, or not known at all
            shown = [one for one in series if one.points]
        if shown:
            figures.append(lines(title, _X, shown, logarithmic=logarithmic))
    return figures


def _firing(firing: Mapping[int, Mapping[str, Any]]) -> list[Markup]:
    """The histogram at the end, and all of them side by side."""
    if not firing:
        return [tag("p", "No histogram was logged.", class_="note")]
    moments, found = list(firing), list(firing.values())
    last, edges = found[-1], found[-1]["edges"]
    totals = [max(sum(one["counts"]) + one["rarer"], 1) for one in found]
    label = "log10 of the share of recent rows on which a latent fires"

    def span(bin: int) -> str:
        return f"10^{edges[bin]:g} to 10^{edges[bin + 1]:g}"

    over_time = heat_map(
        "Over the rows: stronger where more latents lie",
        _X,
        [0.0, *map(float, moments)],
        edges,
        [[count / total for count in one["counts"]] for one, total in zip(found, totals, strict=True)],
        lambda i, j: f"{numerals.count(found[i]['counts'][j])} latents at {span(j)} after {numerals.count(moments[i])}",
    )
    at_end = bars(
        f"After {numerals.count(moments[-1])} rows: latents",
        label,
        edges,
        last["counts"],
        lambda j: f"{numerals.count(last['counts'][j])} latents at {span(j)}",
    )
    rarer = (
        f"{numerals.count(last['rarer'])} of {numerals.count(totals[-1])} latents fire on fewer than one row in "
        f"{10.0 ** -edges[0]:,.0f} in the end and are in no bin. The map's upright axis is the {label}."
    )
    return [charts([at_end, over_time]), tag("p", rarer, class_="note")]


def _settings(config: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    return [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in config.items()]
