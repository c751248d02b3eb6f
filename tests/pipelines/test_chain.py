"""The chain on a tiny model, in this process: contracts between stages, up to date, force, upstream."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.checkpoint import read_sae
from saex_pipe.common.formats.feature_cache import FeatureCache
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.pipelines import chain


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return chain.load_recipe(str(tiny_run.write_recipe(tmp_path_factory.mktemp("recipe"))))


@pytest.fixture(scope="module")
def out(recipe, tmp_path_factory):
    """A finished run."""
    place = str(tmp_path_factory.mktemp("run") / "out")
    finished = list(chain.run_chain(recipe, place, stages=recipe.stages))
    assert [stage.config.stage for stage in finished if stage.ran] == list(recipe.stages)
    return place


def stamps(root):
    return {path: path.stat().st_mtime_ns for path in Path(root).rglob("*") if path.is_file()}


def test_a_second_run_finds_everything_up_to_date(recipe, out):
    before = stamps(out)
    finished = list(chain.run_chain(recipe, out, stages=recipe.stages))
    assert not any(stage.ran for stage in finished)
    assert stamps(out) == before


def test_a_changed_setting_is_refused_by_name_and_force_redoes_what_depends_on_it(recipe, tmp_path):
    place = str(tmp_path / "out")
    list(chain.run_chain(recipe, place, stages=recipe.stages))
    changed = chain.with_assignments(recipe, ["train.k=5"])
    before = stamps(place)
    with pytest.raises(InputError, match=r"another configuration of train: k \(4 there, 5 now\); --force replaces it"):
        list(chain.run_chain(changed, place, stages=recipe.stages))
    assert stamps(place) == before
    finished = list(chain.run_chain(changed, place, stages=recipe.stages, force=True))
    assert [stage.config.stage for stage in finished if stage.ran] == ["train", "evaluate", "cache", "view"]
    after = stamps(place)
    for folder in ("corpus", "activations"):
        assert {p: t for p, t in after.items() if f"/{folder}/" in str(p)} == {
            p: t for p, t in before.items() if f"/{folder}/" in str(p)
        }
    assert read_sae(f"{place}/sae").cfg["k"] == 5
    assert json.loads(Folder(f"{place}/scores").read("scores.json"))["l0"] == pytest.approx(5)
    assert not any(part.endswith(("saex-new", "saex-old")) for path in after for part in path.parts)


def test_another_place_takes_unchanged_stages_from_upstream(recipe, out, tmp_path):
    changed = chain.with_assignments(recipe, ["train.k=3"])
    place = str(tmp_path / "other")
    before = stamps(out)
    finished = list(chain.run_chain(changed, place, stages=recipe.stages, upstream=out))
    assert [stage.config.stage for stage in finished if stage.ran] == ["train", "evaluate", "cache", "view"]
    assert sorted(p.name for p in Path(place).iterdir()) == ["cache", "page", "sae", "scores"]
    assert stamps(out) == before
    assert read_sae(f"{place}/sae").cfg["k"] == 3


def test_an_upstream_result_has_the_same_digest_wherever_it_is(recipe, out):
    here = chain.configure(recipe, "train", "/elsewhere", {"activations": f"{out}/activations"})
    assert not chain.is_up_to_date(here)
    assert chain.is_up_to_date(here.model_copy(update={"out": f"{out}/sae"}))


def test_one_stage_alone_has_the_configuration_of_the_chain(recipe, out):
    for stage in recipe.stages:
        assert chain.is_up_to_date(chain.configure(recipe, stage, out)), stage


def test_held_out_windows_are_never_in_the_store(recipe, out):
    corpus, store = TokenStore(f"{out}/corpus"), ActivationStore(f"{out}/activations")
    info = corpus.info
    assert info.windows == 200
    assert info.windows - info.train_windows == 40
    assert store.info.windows == info.train_windows
    np.testing.assert_array_equal(store.tokens(range(info.train_windows)), corpus.tokens(range(info.train_windows)))
    trained, held_out = (
        set(np.unique(corpus.documents(part)))
        for part in (range(info.train_windows), range(info.train_windows, info.windows))
    )
    assert not trained & held_out


def test_special_tokens_and_first_positions_are_no_rows(out):
    store = ActivationStore(f"{out}/activations")
    windows = range(store.info.windows)
    tokens_NL, keep_NL = store.tokens(windows), store.keep(windows)
    assert (tokens_NL == 0).any(), "the separator is in the text"
    assert not keep_NL[tokens_NL == 0].any()
    assert not keep_NL[:, 0].any()
    assert keep_NL.mean() > 0.8


def test_the_feature_cache_counts_what_the_sae_does(out):
    from saex_pipe.common.sae.compute import Compute
    from saex_pipe.common.sae.inference import Sae
    from saex_pipe.common.sae.saelens import from_saelens

    saved = read_sae(f"{out}/sae")
    store = ActivationStore(f"{out}/activations", (tiny_run.TAP,))
    windows = range(store.info.windows)
    acts_NLD = store.acts(tiny_run.TAP, windows).astype(np.float32)
    codes_NLF = np.array(Sae(*from_saelens(saved.cfg, saved.tensors), Compute(dtype="bfloat16")).encode(acts_NLD))
    codes_NLF[~store.keep(windows)] = 0
    with FeatureCache(Folder(f"{out}/cache")) as cache:
        counts_F = cache.features(["firing_count"]).column(0).to_numpy()
        np.testing.assert_allclose(counts_F, (codes_NLF > 0).sum((0, 1)), atol=3)
        busiest = int(np.argmax(counts_F))
        best = codes_NLF[..., busiest].max(axis=1)
        values = [example["activation"] for example in cache.examples(busiest) if example["stratum"] == "top"]
    assert len(values) == 3
    np.testing.assert_allclose(values, np.sort(best)[::-1][: len(values)], rtol=2e-2)
