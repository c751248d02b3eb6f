"""Sweeps from the command line: which SAEs there are, where they lie, and what is said of them in the end."""

import json
from pathlib import Path

import pytest
import tiny_run

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.checkpoint import read_sae
from saex_pipe.pipelines import chain, cli, sweep

TOY = (*tiny_run.TOY, "--set", "train.rows=2560")


def assigned(*assignments):
    return sweep.members(chain.with_assignments(chain.load_recipe("toy"), list(assignments)))


def test_lists_are_a_grid():
    found = assigned("train.k=2,4", "train.learning_rate=[1e-3, 1e-2]")
    assert [member.name for member in found] == [
        "k=2,learning_rate=0.001",
        "k=2,learning_rate=0.01",
        "k=4,learning_rate=0.001",
        "k=4,learning_rate=0.01",
    ]
    assert found[2].settings == {"k": 4, "learning_rate": 1e-3}
    assert found[2].recipe.settings["train"]["k"] == 4


def test_one_value_is_no_sweep():
    assert [member.name for member in assigned("train.k=2")] == [""]


def test_lists_that_are_one_value_stay_so():
    (only,) = assigned("train.store_weights=1,2", "train.tap=blocks.{1,2}.mlp_out")
    assert only.recipe.settings["train"]["store_weights"] == ["1", "2"]
    assert only.recipe.settings["train"]["tap"] == "blocks.{1,2}.mlp_out"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.k=2,2", r"train.k = \[2, 2\] is no list of different values"),
        ("train.k=[]", r"train.k = \[\] is no list of different values"),
        (f"train.seed={','.join(map(str, range(300)))}", "the sweep has 300 SAEs, more than 256"),
    ],
)
def test_lists_that_make_no_sense_are_refused(assignment, message):
    with pytest.raises(InputError, match=message):
        assigned(assignment)


def test_a_sweep_trains_scores_and_tabulates_every_sae(tmp_path, capfd):
    out = tmp_path / "run"
    command = ["run", "toy", "--out", str(out), *TOY, "--set", "train.k=2,3"]
    assert cli.main(command) in (None, 0)
    printed = capfd.readouterr().out
    rows = json.loads((out / "sweep" / "sweep.json").read_text())
    assert [row["name"] for row in rows] == ["k=2", "k=3"]
    for row in rows:
        k = row["settings"]["k"]
        assert read_sae(row["sae"]).cfg["k"] == k
        assert row["l0"] == pytest.approx(k, abs=0.2)
        assert row["scored_on"] == "held-out rows"
        assert row["name"] in printed
        assert row["name"] in (out / "sweep" / "index.html").read_text()
        assert json.loads((out / "sweep" / f"k={k}" / "scores" / "scores.json").read_text())["fvu"] == row["fvu"]
    stamps = {path: path.stat().st_mtime_ns for path in Path(out).rglob("manifest.json")}
    assert len(stamps) == 5  # the toy, and two SAEs with their scores
    assert cli.main(command) in (None, 0)
    assert "up to date" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    cli.main(["status", str(out)])
    assert "sweep/k=3/sae" in capfd.readouterr().out
