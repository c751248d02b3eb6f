"""Whole pages: the index of the best features and the page of one feature. Self-contained, without network."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from saex_pipe.common import numerals
from saex_pipe.common.formats.feature_cache import CacheSource, FeatureCache
from saex_pipe.common.markup import Markup, join, tag
from saex_pipe.stages.view import charts, examples
from saex_pipe.stages.view.feature_card import feature_card

# Key of scores.json: name, whether it is shown in percent, what it means in plain words. The last two are of toys.
SCORES: dict[str, tuple[str, bool, str]] = {
    "l0": ("L0", False, "latents that fire on a token, on average"),
    "fvu": ("FVU", True, "of the variance of the activations is missed by the reconstruction; 0 % is perfect"),
    "ce_recovered": (
        "CE recovered",
        True,
        "of the language model's skill survives when its activations pass through the SAE; 100 % is all of it",
    ),
    "dead_fraction": ("Dead", True, "of the latents never fire on the rows scored"),
    "recovered_fraction": ("Truth recovered", True, "of the true features have a latent that points their way"),
    "mean_max_cosine_true": (
        "Match",
        False,
        "cosine of a true feature with the nearest latent, on average; 1 is the same direction",
    ),
}


def index_page(cache: FeatureCache, best: Sequence[int], scores: Mapping[str, Any], *, served: bool = False) -> str:
    """The page of the features ``best``, in that order. Served, it leads to the pages of all the others."""
    shown = set(best)

    def link(feature: int) -> str | None:
        return f"#f{feature}" if feature in shown else f"/feature/{feature}" if served else None

    rates_F = cache.features(["firing_rate"]).column("firing_rate").to_numpy()
    rows = [cache.feature(feature) for feature in best]
    contexts = [cache.examples(feature) for feature in best]
    counted = _counted(cache.source)
    cards = [feature_card(row, found, link, counted) for row, found in zip(rows, contexts, strict=True)]
    lines = [_line(place, row, found) for place, (row, found) in enumerate(zip(rows, contexts, strict=True))]
    dead = int((rates_F == 0).sum())
    density = tag(
        "figure",
        charts.density_histogram(rates_F, best, counted),
        tag(
            "figcaption",
            f"Firing rates of the {numerals.count(len(rates_F) - dead)} latents that fire on the "
            f"{numerals.count(cache.source.rows)} {counted} of the cache, ",
            tag("b", "those on this page"),
            f" in colour. {numerals.count(dead)} never fire.",
        ),
    )
    body = [
        tag("header", _title(cache), _source(cache), _tiles(rates_F, scores, counted), density, class_="top"),
        tag("nav", _controls(len(best), len(cache), served), _table(lines, counted), aria_label="Features"),
        tag("main", *cards, tag("p", "No feature matches.", class_="none", id="nothing", hidden=True)),
    ]
    return _document(f"Features of {cache.source.variant} at {cache.source.tap}", "index", join(body))


def feature_page(cache: FeatureCache, feature: int) -> str:
    """The page of one feature, for the server. InputError when there is no such feature."""
    card = feature_card(cache.feature(feature), cache.examples(feature), _page_of, _counted(cache.source))
    steps = [tag("a", "All features", href="/")]
    if feature > 0:
        steps.append(tag("a", f"← #{feature - 1}", href=_page_of(feature - 1), rel="prev"))
    if feature + 1 < len(cache):
        steps.append(tag("a", f"#{feature + 1} →", href=_page_of(feature + 1), rel="next"))
    body = [tag("nav", *steps, _go_to(len(cache)), class_="steps"), tag("main", card)]
    return _document(f"Feature {feature}", "single", join(body))


def _page_of(feature: int) -> str:
    return f"/feature/{feature}"


def _document(title: str, layout: str, body: Markup) -> str:
    files = resources.files(__package__)
    style, script, frame = ((files / name).read_text("utf-8") for name in ("page.css", "page.js", "page.html"))
    # Only this very script may run, and nothing may be fetched: a second wall behind the escaping.
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title_element = tag("title", title)
    return Template(frame).substitute(
        title=title_element, style=style, script=script, script_hash=script_hash, layout=layout, body=body
    )


def _counted(source: CacheSource) -> str:
    return "tokens" if source.model else "rows"


def _title(cache: FeatureCache) -> Markup:
    return tag("h1", f"What {numerals.count(len(cache))} latents respond to")


def _source(cache: FeatureCache) -> Markup:
    source = cache.source
    facts = [("model", source.model or "synthetic activations"), ("tap", source.tap), ("variant", source.variant)]
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts), class_="source")


def _tiles(rates_F: np.ndarray, scores: Mapping[str, Any], counted: str) -> Markup:
    """The scores; without them, what the cache itself tells."""
    values = {"l0": float(rates_F.sum()), "dead_fraction": float((rates_F == 0).mean()) if len(rates_F) else 0.0}
    values |= {key: float(scores[key]) for key in SCORES if isinstance(scores.get(key), int | float)}
    tiles = []
    for key, (name, in_percent, meaning) in SCORES.items():
        if key in values:
            value = numerals.percent(values[key]) if in_percent else numerals.short(values[key])
            words = meaning.replace("a token", "a row") if counted == "rows" else meaning
            tiles.append(tag("div", tag("dt", name), tag("dd", value), tag("p", words)))
    return tag("dl", *tiles, class_="tiles")


def _controls(shown: int, latents: int, served: bool) -> Markup:
    search = tag(
        "label",
        tag("span", "Filter", class_="quiet"),
        Markup(
            '<input id="filter" type="search" '
            'placeholder="Filter by number, token or context" autocomplete="off" spellcheck="false">'
        ),
    )
    hint = f"The best {numerals.count(shown)} of {numerals.count(latents)}. "
    keys = [tag("kbd", "/"), " filter, ", tag("kbd", "j"), tag("kbd", "k"), " next, previous"]
    return tag("div", search, tag("p", hint, tag("span", *keys, class_="keys")), _go_to(latents) if served else "")


def _go_to(latents: int) -> Markup:
    box = Markup(f'<input name="n" type="number" min="0" max="{latents - 1}" required placeholder="number">')
    return tag("form", tag("label", "Feature ", box), tag("button", "Show"), action="/feature", class_="goto")


def _table(lines: Sequence[Markup], counted: str) -> Markup:
    columns = [("rank", "#"), ("feature", "feature"), ("", "fires most on"), ("rate", f"of {counted}"), ("max", "max")]
    heads = [
        tag("th", tag("button", title, type="button", data_key=key) if key else title, scope="col", class_=key or "on")
        for key, title in columns
    ]
    return tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *lines))


def _line(place: int, row: Mapping[str, Any], found: Sequence[examples.Example]) -> Markup:
    feature = row["feature"]
    tokens = " ".join(examples.peak_tokens(found)) or "\N{EN DASH}"
    return tag(
        "tr",
        tag("td", str(place + 1), class_="rank"),
        tag("td", tag("a", str(feature), href=f"#f{feature}"), class_="feature"),
        tag("td", tokens, class_="on"),
        tag("td", numerals.percent(row["firing_rate"]), class_="rate"),
        tag("td", numerals.short(row["max_activation"]), class_="max"),
        data_rank=place,
        data_feature=feature,
        data_rate=row["firing_rate"],
        data_max=row["max_activation"],
    )
