"""Everything about one feature, as one section of a page."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saex_pipe.common import numerals
from saex_pipe.common.markup import Markup, join, tag
from saex_pipe.stages.view import charts, examples

Link = Callable[[int], str | None]  # where a feature is shown, None where it is not


def feature_card(row: Mapping[str, Any], rows: Sequence[examples.Example], link: Link, counted: str) -> Markup:
    """The section of the feature in ``row``, of features.parquet, with its examples ``rows``.

    ``counted`` is what activations are taken of, "tokens" or "rows".
    """
    feature = row["feature"]
    peaks = [tag("b", token, class_="chip") for token in examples.peak_tokens(rows)]
    permanent = link(feature)
    name = tag("a", f"#{feature}", href=permanent) if permanent else f"#{feature}"
    return tag(
        "section",
        tag("header", tag("h2", name, tabindex="-1"), *peaks),
        tag("div", _facts(row, counted), _outputs(row), _nearest(row, link), class_="about"),
        tag("div", examples.strata(rows, row["max_activation"]), class_="examples"),
        id=f"f{feature}",
        class_="card",
    )


def _facts(row: Mapping[str, Any], counted: str) -> Markup:
    facts = [
        ("fires on", numerals.percent(row["firing_rate"]), f"{numerals.count(row['firing_count'])} {counted}"),
        ("maximum", numerals.short(row["max_activation"]), "activation"),
        ("mean", numerals.short(row["mean_activation"]), "where it fires"),
    ]
    items = [tag("div", tag("dt", name), tag("dd", value, tag("small", more))) for name, value, more in facts]
    histogram = charts.activation_histogram(row["histogram"], row["histogram_edges"])
    return tag("div", tag("dl", *items, class_="facts"), tag("figure", histogram), class_="firing")


def _outputs(row: Mapping[str, Any]) -> Markup:
    """The output tokens a feature raises and lowers, with bars in proportion to the effect."""
    sides = [
        ("Raises the logit of", "up", row["top_output_tokens"], row["top_output_effects"]),
        ("Lowers the logit of", "down", row["bottom_output_tokens"], row["bottom_output_effects"]),
    ]
    largest = max((abs(effect) for _, _, _, effects in sides for effect in effects), default=0.0)
    lists = []
    for title, kind, tokens, effects in sides:
        lines = [
            tag("li", tag("code", _spaced(token)), tag("span", numerals.short(effect)), style=_bar(effect, largest))
            for token, effect in zip(tokens, effects, strict=True)
        ]
        if lines:
            lists.append(tag("div", tag("h3", title), tag("ul", *lines, class_=f"effects {kind}")))
    return tag("div", *lists, class_="outputs") if lists else join([])


def _bar(effect: float, largest: float) -> str:
    return f"--w:{abs(effect) / largest if largest > 0 else 0:.2f}"


def _spaced(token: str) -> str:
    """A token in a list of tokens: its own spaces become visible."""
    return token.replace(" ", "·") or "∅"


def _nearest(row: Mapping[str, Any], link: Link) -> Markup:
    links = []
    for feature, cosine in zip(row["nearest_features"], row["nearest_cosines"], strict=True):
        target = link(feature)
        why = None if target else "not on this page: 'saex-pipe view --set serve=true' shows every feature"
        inside = (f"#{feature} ", tag("small", f"{cosine:.2f}".replace("-", numerals.MINUS)))
        item = tag("a", *inside, href=target) if target else tag("span", *inside, title=why)
        links.append(tag("li", item))
    if not links:
        return join([])
    heading = tag("h3", "Nearest features ", tag("small", "cosine of decoder directions"))
    return tag("div", heading, tag("ul", *links, class_="nearest"))
