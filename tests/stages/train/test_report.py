"""The page about a training, made from events and facts alone."""

import json
import re

import pytest

from saex_pipe.stages.train.density import EDGES
from saex_pipe.stages.train.report import Facts, read_events, report

FACTS = Facts(
    "runs/<x>/sae",
    {"batch_rows": 100, "dead_after_rows": 1000, "variant": "topk", "k": 32, "learning_rate": None},
    {"variant": "topk", "latents": 64, "dead_fraction": 0.25, "last_step": {"total": 0.5, "l0": 31.5, "fvu": 0.125}},
    {"rows": 4000, "steps": 40},
)


def firing(step, *filled, rarer=0):
    counts = [0] * (len(EDGES) - 1)
    for place, count in filled:
        counts[place] = count
    return {"step": step, "firing_frequency_log10": {"edges": EDGES.tolist(), "counts": counts, "rarer": rarer}}


def term(step, **values):
    return {"time": 1.0, "work": "training", "rows": step * 100, "step": step, **values}


def figure(page, title):
    (found,) = [part for part in page.split("<figure>")[1:] if title in part]
    return found.split("</figure>")[0]


def points(figure, number=0):
    (path,) = re.findall(rf'<path d="([^"]*)" class="line s{number}"', figure)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_rows_that_were_done_again_are_shown_once_as_they_were_last():
    first = [term(10, l0=40.0), term(20, l0=80.0), firing(20, (3, 64))]
    again = [term(20, l0=40.0), term(30, l0=40.0), firing(20, (3, 60), (4, 4)), firing(40, (5, 64))]
    page = report(FACTS, [*first, *again])
    assert page == report(FACTS, [first[0], *again])
    at = points(figure(page, "L0, latents"))
    assert len(at) == 3
    assert len({y for _, y in at}) == 1, "the 80 is gone"
    assert at[1][0] - at[0][0] == pytest.approx(at[2][0] - at[1][0], abs=0.1)


def test_charts_are_those_of_what_is_known():
    page = report(FACTS, [term(10, loss=1.0, reconstruction=0.9, sparsity=0.0, auxiliary=0.1), term(20, loss=0.5)])
    loss = figure(page, ">Loss<")
    assert re.findall(r'class="key s\d">([a-z]+)<', loss) == ["total", "reconstruction", "auxiliary"]
    assert "Learning rate" not in page
    assert "No histogram was logged" in page
    with_rate = report(FACTS, [term(10, learning_rate=1e-4), term(20, learning_rate=2e-4)])
    assert len(points(figure(with_rate, "Learning rate"))) == 2
    assert "Dead latents" in report(FACTS, [term(10, dead_fraction=0.0)]), "0 throughout is worth knowing"


def test_firing_over_time():
    page = report(FACTS, [firing(10, (8, 16), rarer=48), firing(20, (8, 32), (12, 16), rarer=16)])
    cells = re.findall(r'class="cell" fill-opacity="([\d.]+)"', figure(page, "Over the rows"))
    assert [float(cell) ** 2 for cell in cells] == pytest.approx([0.5, 1.0, 0.5], abs=0.01)
    at_end = figure(page, "After 2,000 rows")
    assert at_end.count('class="bar"') == 2
    assert "32 latents at 10^-4 to 10^-3.75" in at_end
    assert "16 of 64 latents fire on fewer than one row in 1,000,000" in page


def test_numbers_settings_and_nothing_from_elsewhere():
    page = report(FACTS, [term(10, loss=1.0)])
    text = re.sub(r"<[^>]*>", "|", page)
    for shown in ("|31.5|", "|12.5 %|", "|25.0 %|", "|0.500|", "|k||32|", "|learning_rate||null|", "4,000 rows"):
        assert shown in text, shown
    assert "runs/&lt;x&gt;/sae" in page
    assert not re.search(r"<script|<x>|https?://|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page


def test_a_line_that_was_cut_off_is_left_out():
    whole = json.dumps(term(10, l0=1.0))
    assert read_events(f"{whole}\n{whole}\n{whole[:20]}".encode()) == [term(10, l0=1.0)] * 2
    assert read_events(b"") == []
