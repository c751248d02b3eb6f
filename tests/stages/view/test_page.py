"""The pages, read back with an HTML parser: what they show, and that text from outside stays text."""

import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from saex_pipe.common.formats.feature_cache import FeatureCache
from saex_pipe.common.formats.folder import Folder
from saex_pipe.stages.view import examples
from saex_pipe.stages.view.page import feature_page, index_page

HOSTILE = 42
VOID = {"meta", "input"}


class Page(HTMLParser):
    """Collects elements, the text inside them, and complains about tags that do not pair."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]


@pytest.fixture
def pages(make_cache: Callable[..., Folder]) -> tuple[str, str]:
    """The index with the hostile feature on it, and its own page."""
    with FeatureCache(make_cache()) as cache:
        scores = {"l0": 32.0, "fvu": 0.1934, "ce_recovered": 0.9731, "dead_fraction": 0.0125, "kl": None}
        return index_page(cache, [3, HOSTILE, 4], scores), feature_page(cache, HOSTILE)


def test_text_from_outside_stays_text(pages: tuple[str, str]) -> None:
    known = {
        *("html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "dl", "div", "dt", "dd", "p"),
        *("figure", "figcaption", "svg", "rect", "line", "text", "b", "nav", "label", "span", "input", "kbd", "table"),
        *("thead", "tbody", "tr", "th", "td", "button", "a", "main", "section", "small", "ul", "ol", "li", "code"),
        *("mark", "details", "summary", "script", "form"),
    }
    for source in pages:
        page = Page(source)
        assert {tag for tag, _ in page.elements} <= known
        names = {name for _, attributes in page.elements for name in attributes}
        assert not [name for name in names if name.startswith("on")]
        assert not names & {"src", "srcset", "srcdoc", "formaction"}
        assert len(page.scripts) == 1
        targets = [str(a["href"]) for _, a in page.elements if "href" in a]
        assert targets
        assert all(re.fullmatch(r"#f\d+|/feature/\d+|/", target) for target in targets)
        for token in ("<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "$title", "</style></mark>"):
            assert token in page.text
        assert "⟨202E⟩gnp.exe" in page.text
        assert "\u202e" not in source
        assert "\x00" not in source


def test_hostile_source_and_names_stay_text(make_cache: Callable[..., Folder]) -> None:
    with FeatureCache(make_cache()) as cache:
        cache.source = cache.source._replace(tap="</title><script>x</script>", model="<b>", variant='"')
        page = Page(index_page(cache, [1], {}))
    assert len(page.scripts) == 1
    assert page.text.count("</title><script>x</script>") == 2


def test_pages_need_no_network_and_run_only_their_own_script(pages: tuple[str, str]) -> None:
    for source in pages:
        assert not re.search(r"https?://|@import|url\(", source)
        page = Page(source)
        policy = str(page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"])
        digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
        assert "default-src 'none'" in policy
        assert f"script-src 'sha256-{digest}'" in policy


def test_index_shows_scores_with_units_and_features_in_order(pages: tuple[str, str]) -> None:
    page = Page(pages[0])
    for text in ("L032.0", "FVU19.3 %", "CE recovered97.3 %", "Dead1.25 %", "blocks.15.resid_pre", "topk", "SmolLM2"):
        assert text in page.text
    assert [card["id"] for card in page.all("section")] == ["f3", "f42", "f4"]
    assert [row["data-feature"] for row in page.all("tr") if row] == ["3", "42", "4"]
    assert page.all("a", href="#f4")  # the nearest feature of 3
    assert not [a for a in page.all("a") if str(a["href"]).startswith("/")]
    assert "237 latents that fire on the 250,000 tokens" in page.text


def test_without_scores_the_index_shows_what_the_cache_tells(make_cache: Callable[..., Folder]) -> None:
    with FeatureCache(make_cache(text=False)) as cache:
        rates = cache.features(["firing_rate"]).column("firing_rate").to_numpy()
        page = Page(index_page(cache, [1, 2], {}))
    assert f"L0{rates.sum():.2f}latents that fire on a row" in page.text
    assert "Dead1.25 %" in page.text
    assert "FVU" not in page.text
    assert "synthetic activations" in page.text
    assert "Raises the logit" not in page.text
    assert len(page.all("p", **{"class": "cells"})) == 2 * 20


def test_scores_of_a_toy_are_shown(make_cache: Callable[..., Folder]) -> None:
    with FeatureCache(make_cache(text=False)) as cache:
        scores = {"recovered_fraction": 0.953, "mean_max_cosine_true": 0.981, "ce_recovered": None}
        page = Page(index_page(cache, [1], scores))
    assert "Truth recovered95.3 %" in page.text
    assert "Match0.981" in page.text
    assert "CE recovered" not in page.text


def test_served_index_leads_to_every_feature(make_cache: Callable[..., Folder]) -> None:
    with FeatureCache(make_cache()) as cache:
        page = Page(index_page(cache, [3, 4], {}, served=True))
    assert page.all("a", href="/feature/8")
    assert page.all("a", href="#f4")
    assert page.all("form", action="/feature")


def test_feature_page_leads_to_its_neighbours(make_cache: Callable[..., Folder]) -> None:
    with FeatureCache(make_cache()) as cache:
        first, last = Page(feature_page(cache, 0)), Page(feature_page(cache, len(cache) - 1))
        dead = Page(feature_page(cache, 7))
    assert first.all("a", rel="next", href="/feature/1")
    assert not first.all("a", rel="prev")
    assert last.all("a", rel="prev", href="/feature/238")
    assert not last.all("a", rel="next")
    assert "No examples: it never fires" in dead.text


def row(stratum: str, activations: list[float], tokens: list[str], peak: int) -> dict[str, object]:
    return {
        "stratum": stratum,
        "window": 1234,
        "position": 10 + peak,
        "activation": activations[peak],
        "context_start": 10,
        "context_activations": activations,
        "context_tokens": tokens,
    }


def test_tokens_are_shaded_in_proportion_and_the_peak_is_marked() -> None:
    shown = examples.strata([row("top", [0.0, 2.0, 0.0, 8.0, -1.0], [" a", "\n", " b", " <c>", ""], 3)], 16.0)
    assert '<span class="act" title="window 1,234, token 13">8.00</span>' in shown
    assert (
        '<p class="text" dir="auto">a<mark style="--a:0.12" data-v="2.00">↵</mark> b '
        '<mark class="peak" style="--a:0.50" data-v="8.00">&lt;c&gt;</mark></p>'
    ) in shown


def test_strata_come_strongest_first_and_long_lists_fold() -> None:
    rows = [row(name, [1.0], ["x"], 0) for name in ("odd", "q1", "q10", "q2", *["top"] * 11)]
    shown = examples.strata(rows, 1.0)
    headings = re.findall(r"<(?:h3|summary)>([^<]*)", shown)
    bands = [f"1 from band {name}: activation 1.00" for name in ("q10", "q2", "q1", "odd")]
    assert headings == ["Strongest examples", "3 more", *bands]


def test_peak_tokens_count_the_strongest_examples_alone() -> None:
    rows = [row("top", [1.0], [token], 0) for token in (" War", "war", "a", "b", "c", "b", "d")]
    rows += [row("q1", [1.0], ["q"], 0)] * 5 + [row("top", [1.0], [], 0)]
    assert examples.peak_tokens(rows, 3) == ["War", "b", "a"]
