"""End-to-end tuning on a tiny model: what it is for, its loss and gradient, resuming, what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.checkpoint import SAE_FILES, read_sae
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.load import load_model
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.saelens import from_saelens
from saex_pipe.pipelines import chain
from saex_pipe.stages.tune import run as tune
from saex_pipe.stages.tune.config import Config

SETTINGS = {"tokens_seen": 32 * 8 * 12, "compute_dtype": "float32", "learning_rate": 3e-3}
TAPS = (tiny_run.TAP, "blocks.1.mlp_in", "blocks.1.mlp_out")
SAES = {
    "sae": [],
    "layer_norm": ["normalise=layer_norm"],
    "uncentred": ["normalise=layer_norm", "centred=false", "rows=1024"],
    "transcoder": [f"tap={TAPS[1]}", f"target_tap={TAPS[2]}", "rows=1024"],
    "whitened": ["normalise=whitening_pca"],
    "crosscoder": ["tap=none", f'taps=["{TAPS[0]}", "{TAPS[1]}"]', "rows=512"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of the tiny recipe up to the trained SAEs."""
    place = tmp_path_factory.mktemp("run")
    recipe = chain.load_recipe(str(tiny_run.write_recipe(place)))
    own = [f"harvest.taps={json.dumps(TAPS)}", f"train.tap={TAPS[0]}", "train.rows=5120"]
    recipe = chain.with_assignments(recipe, own)
    list(chain.run_chain(recipe, str(place / "out"), stages=["corpus", "harvest"]))
    for name, settings in SAES.items():
        train = chain.configure(chain.with_assignments(recipe, settings, "train"), "train", f"{place}/out")
        chain.finish_stage(train.model_copy(update={"out": f"{place}/out/{name}"}), force=False)
    return place


def config(place, out, sae="sae", **changes):
    inputs = {"sae": f"{place}/out/{sae}", "model": f"{place}/model", "tokens": f"{place}/out/corpus"}
    return Config.create({"out": str(out)} | inputs | SETTINGS | changes)


def kl(place, sae, out):
    recipe = chain.load_recipe(str(place / "tiny.toml"))
    evaluate = chain.configure(recipe, "evaluate", f"{place}/out").model_copy(
        update={"sae": str(sae), "out": str(out), "compute_dtype": "float32"}
    )
    chain.finish_stage(evaluate, force=False)
    return json.loads(Folder(str(out)).read("scores.json"))["kl"]


@pytest.mark.parametrize("sae", ["sae", "layer_norm"])
def test_a_tuned_sae_changes_the_model_less(place, tmp_path, sae):
    tune.run(config(place, tmp_path / "tuned", sae))
    before = kl(place, place / "out" / sae, tmp_path / "before")
    after = kl(place, tmp_path / "tuned", tmp_path / "after")
    assert 0 < after < 0.9 * before
    saved = read_sae(str(tmp_path / "tuned"))
    assert saved.cfg == read_sae(f"{place}/out/{sae}").cfg
    assert saved.cfg["normalize_activations"] == ("layer_norm" if sae == "layer_norm" else "none")
    assert saved.saex["tuned"]["objective"] == "kl"


@pytest.mark.parametrize("sae", ["sae", "whitened"])
def test_rows_of_the_decoder_keep_the_lengths_that_training_gave_them(place, tmp_path, sae):
    tune.run(config(place, tmp_path / "tuned", sae))
    before, after = (read_sae(str(out)).tensors["W_dec"] for out in (place / "out" / sae, tmp_path / "tuned"))
    lengths_F = np.linalg.norm(before, axis=1)
    assert lengths_F.std() / lengths_F.mean() > 0.05 or sae == "sae"
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), lengths_F, rtol=1e-5)
    assert np.abs(after - before).max() > 0.01 * lengths_F.max()


def rows_of(policy, tokens_NL, found):
    keep_NL = ~np.isin(tokens_NL, policy["special_ids"])
    keep_NL[:, policy["positions"]] = False
    for tap, limit in policy["norm_limits"].items():
        keep_NL &= np.linalg.norm(np.asarray(found[tap]), axis=-1) <= limit
    return keep_NL


def direct(settings):
    """What the first step of ``settings`` reports, from whole passes of the model with the saved SAE spliced in."""
    saved, corpus = read_sae(settings.sae), TokenStore(settings.tokens)
    sae, (tap,), (target,) = Sae(*from_saelens(saved.cfg, saved.tensors)), saved.taps, saved.target_taps
    tokens_NL = corpus.tokens(tune.Batches(settings, corpus).windows(0))
    model = load_model(Path(settings.model), dtype="float32")
    policy = saved.saex["row_policy"]
    clean = apply(model, tokens_NL, taps=tuple(dict.fromkeys((tap, target, *policy["norm_limits"]))))
    keep_NL = rows_of(policy, tokens_NL, clean.taps)
    places_B = np.resize(np.flatnonzero(keep_NL), keep_NL.size)
    log_p = jax.nn.log_softmax(clean.logits_NLV)

    def in_own_units(acts_NLD):
        rows_BD = clean.taps[target].reshape(-1, acts_NLD.shape[-1])
        acts_BD = acts_NLD.reshape(rows_BD.shape)
        if sae.row_norm:
            acts_BD = (acts_BD - rows_BD.mean(1, keepdims=True)) / rows_BD.std(1, ddof=1, keepdims=True)
        return acts_BD[places_B]

    def loss(params):
        recon_NLD = replace(sae, params=params).reconstruct(clean.taps[tap])
        edits = {target: lambda value_NLD, _: jnp.where(jnp.asarray(keep_NL)[..., None], recon_NLD, value_NLD)}
        log_q = jax.nn.log_softmax(apply(model, tokens_NL, edits=edits).logits_NLV)
        nats_NL1 = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)[:, :-1]
        if settings.objective == "cross_entropy":
            nats_NL1 = -jnp.take_along_axis(log_q[:, :-1], tokens_NL[:, 1:, None], axis=-1)
        x_BD, recon_BD = in_own_units(clean.taps[target]), in_own_units(recon_NLD)
        fvu = jnp.sum((x_BD - recon_BD) ** 2) / jnp.sum((x_BD - x_BD.mean(0, keepdims=True)) ** 2)
        nats = nats_NL1.mean()
        total = (fvu + settings.balance * jax.lax.stop_gradient(fvu / nats) * nats) / (1 + settings.balance)
        return total, {"total": total, "sae_loss": fvu, "objective": nats}

    gradients, terms = jax.jit(jax.grad(loss, has_aux=True))(sae.params)
    gradients = sae.variant.project_gradients(sae.params, gradients)
    return terms | {"gradient_norm": jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in gradients.values()))}


@pytest.mark.parametrize(
    ("sae", "objective"),
    [*((name, "kl") for name in SAES if name != "crosscoder"), ("layer_norm", "cross_entropy")],
)
def test_the_first_step_is_that_of_the_saved_sae_spliced_into_the_model(place, tmp_path, sae, objective):
    one_step = {"objective": objective, "tokens_seen": 32 * 8, "learning_rate": 1e-30, "balance": 2.0}
    settings = config(place, tmp_path / "tuned", sae, **one_step)
    found = tune.run(settings).contents["last_step"]
    expected = direct(settings)
    for name in ("total", "sae_loss", "objective"):
        assert found[name] == pytest.approx(float(expected[name]), rel=1e-4), name
    before, after = read_sae(settings.sae), read_sae(settings.out)
    assert after.cfg == before.cfg
    if before.cfg["normalize_activations"] == "layer_norm":  # other parameters are tuned in units of their own
        assert found["gradient_norm"] == pytest.approx(float(expected["gradient_norm"]), rel=1e-4)
    for name, tensor in before.tensors.items():
        np.testing.assert_allclose(after.tensors[name], tensor, rtol=1e-6, atol=2e-7, err_msg=name)


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
        ({"sae": "nowhere"}, "holds no finished output"),
        ({"sae": "crosscoder"}, "its taps feed one another: there is no one place to splice it in"),
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
