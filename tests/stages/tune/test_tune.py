"""End-to-end tuning on a tiny model: what it is for, resuming, what it refuses."""

import json

import pytest
import tiny_run

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.checkpoint import SAE_FILES, read_sae
from saex_pipe.common.formats.folder import Folder
from saex_pipe.pipelines import chain
from saex_pipe.stages.tune import run as tune
from saex_pipe.stages.tune.config import Config

SETTINGS = {"tokens_seen": 32 * 8 * 12, "compute_dtype": "float32", "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of the tiny recipe up to its trained SAE."""
    place = tmp_path_factory.mktemp("run")
    recipe = chain.load_recipe(str(tiny_run.write_recipe(place)))
    recipe = chain.with_assignments(recipe, ["train.rows=5120", "evaluate.compute_dtype=float32"])
    list(chain.run_chain(recipe, str(place / "out"), stages=["corpus", "harvest", "train"]))
    return place


def config(place, out, **changes):
    inputs = {"sae": f"{place}/out/sae", "model": f"{place}/model", "tokens": f"{place}/out/corpus"}
    return Config.create({"out": str(out)} | inputs | SETTINGS | changes)


def kl(place, sae, out):
    recipe = chain.load_recipe(str(place / "tiny.toml"))
    evaluate = chain.configure(recipe, "evaluate", f"{place}/out").model_copy(
        update={"sae": str(sae), "out": str(out), "compute_dtype": "float32"}
    )
    chain.finish_stage(evaluate, force=False)
    return json.loads(Folder(str(out)).read("scores.json"))["kl"]


def test_a_tuned_sae_changes_the_model_less(place, tmp_path):
    tune.run(config(place, tmp_path / "tuned"))
    before = kl(place, place / "out" / "sae", tmp_path / "before")
    after = kl(place, tmp_path / "tuned", tmp_path / "after")
    assert 0 < after < 0.9 * before
    saved = read_sae(str(tmp_path / "tuned"))
    assert saved.cfg == read_sae(f"{place}/out/sae").cfg
    assert saved.saex["tuned"]["objective"] == "kl"


def test_an_objective_without_weight_is_training_as_before(place, tmp_path):
    """Both terms of the log stay, but the parameters do not feel the model."""
    for objective in ("kl", "cross_entropy"):
        tune.run(config(place, tmp_path / objective, objective=objective, balance=0.0, tokens_seen=512))
    first, second = (read_sae(str(tmp_path / objective)).tensors for objective in ("kl", "cross_entropy"))
    assert all((first[name] == second[name]).all() for name in first)
    tune.run(config(place, tmp_path / "weighted", tokens_seen=512))
    assert (read_sae(str(tmp_path / "weighted")).tensors["W_dec"] != first["W_dec"]).any()


class Interrupted(BaseException):
    """Stands for a kill: nothing in the code under test catches it."""


def test_a_killed_run_resumes_to_the_same_bits(place, tmp_path, monkeypatch):
    settings = {"tokens_seen": 32 * 8 * 6, "checkpoint_every_steps": 2}
    tune.run(config(place, tmp_path / "whole", **settings))
    undisturbed = tune.Reader.read

    def read(self, step):
        if step == 5:
            raise Interrupted
        return undisturbed(self, step)

    monkeypatch.setattr(tune.Reader, "read", read)
    with pytest.raises(Interrupted):
        tune.run(config(place, tmp_path / "killed", **settings))
    seen = []
    monkeypatch.setattr(tune.Reader, "read", lambda self, step: seen.append(step) or undisturbed(self, step))
    tune.run(config(place, tmp_path / "killed", **settings))
    assert seen == [0, 4, 5]  # the first for its units
    whole, killed = (
        {name: Folder(str(tmp_path / kind)).read(name) for name in SAE_FILES} for kind in ("whole", "killed")
    )
    assert whole == killed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_windows": 10_000}, "fewer than tune.batch_windows = 10000"),
        ({"sparsity_coefficient": 1.0}, "this SAE has no sparsity penalty"),
        ({"sae": "/nowhere"}, "holds no finished output"),
    ],
)
def test_bad_settings_leave_nothing_behind(place, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        tune.run(config(place, tmp_path / "tuned", **changes))
    assert not (tmp_path / "tuned").exists()


def test_later_stages_of_a_recipe_take_the_tuned_sae(place):
    recipe = chain.with_assignments(chain.load_recipe(str(place / "tiny.toml")), ["tune.tokens_seen=512"])
    with_tune = chain.Recipe(recipe.name, "", (*recipe.stages[:3], "tune", *recipe.stages[3:]), recipe.settings, "")
    assert chain.configure(recipe, "evaluate", "/run").sae == "/run/sae"
    assert chain.configure(with_tune, "evaluate", "/run").sae == "/run/tuned"
    assert chain.configure(with_tune, "tune", "/run").sae == "/run/sae"
    assert chain.configure(with_tune, "cache", "/run", member="k=4").sae == "/run/sweep/k=4/tuned"
    assert chain.configure(with_tune, "evaluate", "/run", member="k=4").tokens == "/run/corpus"
