"""The page about a sweep: its table, its front."""

import re

import pytest

from saex_pipe.pipelines.sweep_report import pareto, sweep_report

NONE = "\N{EN DASH}"
MEMBERS = [
    {"name": "a", "settings": {"k": 16}, "l0": 15.9, "fvu": 0.3, "ce_recovered": 0.9, "dead_fraction": 0.0},
    {
        "name": "b",
        "settings": {"k": 32, "lr": 2e-4},
        "l0": 31.5,
        "fvu": 0.2,
        "ce_recovered": 0.95,
        "dead_fraction": 0.1,
    },
    {"name": "<c>", "settings": {"k": 64}, "l0": 60.0, "fvu": 0.25, "ce_recovered": 0.97, "dead_fraction": None},
]


@pytest.mark.parametrize(
    ("pairs", "front"),
    [
        ([(1, 3), (2, 2), (3, 1)], [True, True, True]),
        ([(1, 3), (2, 3), (1, 4)], [True, False, False]),
        ([(1, 1), (1, 1), (2, 2)], [True, True, False]),
        ([], []),
    ],
)
def test_the_front(pairs, front):
    assert pareto(pairs) == front


def figures(page):
    return [part.split("</figure>")[0] for part in page.split("<figure>")[1:]]


def rows(page):
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", page)]


def test_one_row_an_sae_and_a_plot_for_each_kind_of_quality():
    page = sweep_report(MEMBERS)
    assert rows(page) == [
        ["SAE", "k", "lr", "L0", "FVU", "cross-entropy recovered", "dead"],
        ["a", "16", NONE, "15.9", "30.0 %", "90.0 %", "0 %"],
        ["b", "32", "0.0002", "31.5", "20.0 %", "95.0 %", "10.0 %"],
        ["&lt;c&gt;", "64", NONE, "60.0", "25.0 %", "97.0 %", NONE],
    ]
    fvu, recovered = figures(page)
    assert fvu.count('class="point best"') == 2, "the widest is beaten"
    assert recovered.count('class="point best"') == 3, "more is better here"


def test_without_a_language_model_there_is_no_plot_of_one():
    page = sweep_report([{**member, "ce_recovered": None} for member in MEMBERS])
    assert len(figures(page)) == 1
    assert "cross-entropy" not in page
    assert rows(sweep_report([])) == [["SAE"]]
