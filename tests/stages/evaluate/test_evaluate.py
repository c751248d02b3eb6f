"""Scores through the model against a direct computation; transcoders; the toy's match is tested in common/sae."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.checkpoint import read_sae
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.load import load_model
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.saelens import from_saelens
from saex_pipe.pipelines import chain

PAIR = ("blocks.1.mlp_in", "blocks.1.mlp_out")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def recipe(place):
    recipe = chain.load_recipe(str(tiny_run.write_recipe(place / "recipe")))
    return chain.with_assignments(
        recipe,
        [
            f'harvest.taps=["embed", "{tiny_run.TAP}", "{PAIR[0]}", "{PAIR[1]}"]',
            f"train.tap={tiny_run.TAP}",
            "harvest.compute_dtype=float32",
            "evaluate.compute_dtype=float32",
            "evaluate.max_tokens=320",
            "train.rows=5120",
        ],
    )


def scores_of(recipe, out):
    list(chain.run_chain(recipe, str(out), stages=("corpus", "harvest", "train", "evaluate")))
    return json.loads(Folder(f"{out}/scores").read("scores.json"))


def direct(place, out, target):
    """Cross-entropies, KL and FVU from three full passes and dense logits, in float64."""
    corpus = TokenStore(f"{out}/corpus")
    windows = range(corpus.info.train_windows, corpus.info.windows)[:10]
    tokens_NL = corpus.tokens(windows)
    model = load_model(place / "recipe" / "model", dtype="float32")
    saved = read_sae(f"{out}/sae")
    sae = Sae(*from_saelens(saved.cfg, saved.tensors))
    tap = saved.saex["tap"]
    policy = saved.saex["row_policy"]
    found = {}
    with jax.default_matmul_precision("highest"):
        taps = tuple(dict.fromkeys((tap, target, *policy["norm_limits"])))
        clean = apply(model, tokens_NL, taps=taps)
        keep_NL = ~np.isin(tokens_NL, policy["special_ids"])
        keep_NL[:, policy["positions"]] = False
        for name, limit in policy["norm_limits"].items():
            keep_NL &= np.linalg.norm(np.asarray(clean.taps[name]), axis=-1) <= limit
        recon_NLD = sae.reconstruct(clean.taps[tap])
        for name, new_NLD in (("sae", recon_NLD), ("zero", jnp.zeros_like(recon_NLD))):
            edit = {target: lambda value, _, new=new_NLD: jnp.where(jnp.asarray(keep_NL)[..., None], new, value)}
            found[name] = np.asarray(apply(model, tokens_NL, edits=edit).logits_NLV, np.float64)
    found["clean"] = np.asarray(clean.logits_NLV, np.float64)
    log_p = {name: x - np.log(np.exp(x).sum(-1, keepdims=True)) for name, x in found.items()}
    ce = {n: -np.take_along_axis(p[:, :-1], tokens_NL[:, 1:, None], -1).mean() for n, p in log_p.items()}
    kl = (np.exp(log_p["clean"]) * (log_p["clean"] - log_p["sae"])).sum(-1)[:, :-1].mean()
    rows_BD, recon_BD = (np.asarray(a, np.float64)[keep_NL] for a in (clean.taps[target], recon_NLD))
    fvu = np.square(rows_BD - recon_BD).sum() / np.square(rows_BD - rows_BD.mean(0)).sum()
    return ce, kl, fvu, keep_NL.sum()


@pytest.mark.parametrize(("tap", "target"), [(tiny_run.TAP, tiny_run.TAP), PAIR, PAIR[::-1], ("embed", "embed")])
def test_scores_equal_a_direct_computation(place, recipe, tap, target):
    changes = [f"train.tap={tap}", *([f"train.target_tap={target}"] if target != tap else [])]
    out = place / f"run-{tap}"
    scores = scores_of(chain.with_assignments(recipe, changes), out)
    ce, kl, fvu, rows = direct(place, out, target)
    assert scores["rows"] == rows
    assert scores["l0"] == pytest.approx(4, abs=0.1)
    for name in ("clean", "sae", "zero"):
        assert scores[f"ce_{name}"] == pytest.approx(ce[name], rel=1e-5), name
    assert scores["kl"] == pytest.approx(kl, rel=1e-3)
    assert scores["fvu"] == pytest.approx(fvu, rel=1e-4)
    expected = (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"])
    assert scores["ce_recovered"] == pytest.approx(expected, rel=1e-3)


def test_a_store_without_held_out_windows_is_refused(recipe, tmp_path):
    bare = chain.with_assignments(recipe, ["corpus.holdout_fraction=0", "train.rows=512"])
    with pytest.raises(InputError, match="has 0 held-out windows"):
        scores_of(bare, tmp_path / "out")
    assert not (tmp_path / "out" / "scores").exists()


def test_an_sae_of_another_width_is_refused(place, recipe, tmp_path):
    scores_of(recipe, place / f"run-{tiny_run.TAP}")
    other = chain.with_assignments(recipe, ["evaluate.tap=blocks.99.resid_pre"])
    config = chain.configure(other, "evaluate", str(place / f"run-{tiny_run.TAP}")).model_copy(
        update={"out": str(tmp_path / "s")}
    )
    with pytest.raises(InputError, match=r"the model has no tap 'blocks.99.resid_pre'"):
        chain.finish_stage(config, force=False)


def test_a_transcoder_is_not_moved_to_another_tap(place, recipe, tmp_path):
    pair = chain.with_assignments(recipe, [f"train.tap={PAIR[0]}", f"train.target_tap={PAIR[1]}"])
    scores_of(pair, place / f"run-{PAIR[0]}")
    named = chain.with_assignments(pair, [f"evaluate.tap={tiny_run.TAP}"])
    config = chain.configure(named, "evaluate", str(place / f"run-{PAIR[0]}")).model_copy(
        update={"out": str(tmp_path / "s")}
    )
    with pytest.raises(InputError, match=f"the transcoder reads {PAIR[0]} and predicts {PAIR[1]}"):
        chain.finish_stage(config, force=False)


@pytest.mark.parametrize("normalise", ["mean_square", "layer_norm"])
def test_a_crosscoder_is_scored_on_each_of_its_taps_and_on_all(place, recipe, normalise):
    settings = ["train.tap=none", f'train.taps=["embed", "{tiny_run.TAP}"]', f"train.normalise={normalise}"]
    both, out = chain.with_assignments(recipe, settings), place / f"run-crosscoder-{normalise}"
    scores = scores_of(both, out)
    corpus, saved = TokenStore(f"{out}/corpus"), read_sae(f"{out}/sae")
    taps = saved.taps
    assert set(taps) == {"embed", tiny_run.TAP}
    tokens_NL = corpus.tokens(range(corpus.info.train_windows, corpus.info.windows)[:10])
    model = load_model(place / "recipe" / "model", dtype="float32")
    limited = saved.saex["row_policy"]["norm_limits"]
    found = apply(model, tokens_NL, taps=tuple(dict.fromkeys([*taps, *limited]))).taps
    keep_NL = ~np.isin(tokens_NL, saved.saex["row_policy"]["special_ids"])
    keep_NL[:, saved.saex["row_policy"]["positions"]] = False
    for name, limit in limited.items():
        keep_NL &= np.linalg.norm(np.asarray(found[name]), axis=-1) <= limit
    rows = [np.asarray(found[tap], np.float32)[keep_NL] for tap in taps]
    recon_BD = np.asarray(Sae(*from_saelens(saved.cfg, saved.tensors)).reconstruct(np.concatenate(rows, axis=1)))

    def fvu(rows_BD, recon_BD):
        return np.square(rows_BD - recon_BD).sum() / np.square(rows_BD - rows_BD.mean(axis=0)).sum()

    assert scores["rows"] == keep_NL.sum()
    assert scores["fvu"] == pytest.approx(fvu(np.concatenate(rows, axis=1), recon_BD), rel=1e-4)
    for tap, rows_BD, part_BD in zip(taps, rows, np.split(recon_BD, 2, axis=1), strict=True):
        assert scores[f"fvu.{tap}"] == pytest.approx(fvu(rows_BD, part_BD), rel=1e-4)
    assert scores["ce_recovered"] is None
    named = chain.configure(chain.with_assignments(both, ["evaluate.tap=embed"]), "evaluate", str(out))
    with pytest.raises(InputError, match=f"the crosscoder reads {taps[0]}, {taps[1]}"):
        chain.finish_stage(named.model_copy(update={"out": str(place / "refused")}), force=False)
