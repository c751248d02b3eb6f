"""The train stage on a toy store: resuming, units, transcoders, what is saved."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.checkpoint import SAE_FILES, read_sae
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.row_reader import RowReader
from saex_pipe.common.sae.geometric_median import geometric_median
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.saelens import from_saelens
from saex_pipe.stages.toy import run as toy
from saex_pipe.stages.toy.config import Config as ToyConfig
from saex_pipe.stages.train import run as train
from saex_pipe.stages.train.config import Config

SETTINGS = {"latents": 32, "k": 2, "batch_rows": 128, "rows": 128 * 60, "compute_dtype": "float32"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("toy") / "activations")
    toy.run(ToyConfig(out=out, latents=24, width=12, active=2.0, rows=8192))
    return out


def run(store, out, **changes):
    return train.run(Config.create({"store": store, "out": str(out)} | SETTINGS | changes))


def sae_bytes(out):
    return {name: Folder(str(out)).read(name) for name in SAE_FILES}


class Interrupted(BaseException):
    """Stands for a kill: nothing in the code under test catches it."""


@pytest.mark.parametrize(
    ("moments", "changes"),
    [
        ((3,), {}),
        ((25, 26), {}),
        ((20, 40, 59), {}),
        ((25,), {"normalise": "ema"}),
        ((25,), {"normalise": "whitening_zca", "sample_rows": 100}),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(store, tmp_path, monkeypatch, moments, changes):
    run(store, tmp_path / "whole", **changes)
    undisturbed = RowReader.batch
    for moment in moments:

        def batch(self, step, rows, moment=moment):
            if step == moment:
                raise Interrupted
            return undisturbed(self, step, rows)

        monkeypatch.setattr(RowReader, "batch", batch)
        with pytest.raises(Interrupted):
            run(store, tmp_path / "killed", checkpoint_every_steps=10, **changes)
    seen = []
    monkeypatch.setattr(RowReader, "batch", lambda self, step, rows: seen.append(step) or undisturbed(self, step, rows))
    run(store, tmp_path / "killed", checkpoint_every_steps=10, **changes)
    assert seen[0] == moments[-1] // 10 * 10, "only the steps since the last checkpoint are done again"
    assert sae_bytes(tmp_path / "killed") == sae_bytes(tmp_path / "whole")


def test_a_saved_sae_takes_raw_activations(store, tmp_path):
    manifest = run(store, tmp_path)
    saved = read_sae(str(tmp_path))
    source = ActivationStore(store, ("toy",))
    rows_BD = source.acts("toy", range(4)).reshape(-1, 12)
    sae = Sae(*from_saelens(saved.cfg, saved.tensors))
    recon_BD = np.asarray(sae.reconstruct(rows_BD))
    fvu = np.square(rows_BD - recon_BD).sum() / np.square(rows_BD - rows_BD.mean(0)).sum()
    assert fvu == pytest.approx(manifest.contents["last_step"]["fvu"], abs=0.1)
    assert fvu < 0.6


@pytest.mark.parametrize(
    "changes",
    [
        {"normalise": "expected_norm"},
        {"normalise": "clipped", "clip_multiple": 1.5},
        {"normalise": "ema", "ema_decay": 0.9},
        {"normalise": "layer_norm"},
        {"normalise": "whitening_pca", "sample_rows": 500},
    ],
    ids=lambda changes: changes["normalise"],
)
def test_whatever_the_units_of_training_a_saved_sae_takes_raw_activations(store, tmp_path, changes):
    run(store, tmp_path, learning_rate=1e-2, **changes)
    saved = read_sae(str(tmp_path))
    rows_BD = ActivationStore(store, ("toy",)).acts("toy", range(4)).reshape(-1, 12)
    recon_BD = np.asarray(Sae(*from_saelens(saved.cfg, saved.tensors)).reconstruct(rows_BD))
    fvu = np.square(rows_BD - recon_BD).sum() / np.square(rows_BD - rows_BD.mean(0)).sum()
    assert fvu < 0.6
    assert saved.cfg["normalize_activations"] == ("layer_norm" if changes["normalise"] == "layer_norm" else "none")


def test_training_without_normalisation_saves_what_was_trained(store, tmp_path):
    run(store, tmp_path, normalise="none")
    norms = np.linalg.norm(read_sae(str(tmp_path)).tensors["W_dec"], axis=1)
    np.testing.assert_allclose(norms, 1.0, rtol=1e-5)


def test_a_relu_is_trained_and_sparser_with_a_larger_coefficient(store, tmp_path):
    found = {}
    for coefficient in (0.1, 3.0):
        out = tmp_path / str(coefficient)
        manifest = run(store, out, variant="relu", k=None, sparsity_coefficient=coefficient, learning_rate=3e-3)
        found[coefficient] = manifest.contents["last_step"]["l0"]
    assert found[3.0] < found[0.1]


def test_the_log_holds_the_loss_and_units(store, tmp_path):
    run(store, tmp_path)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert events[-1]["rows"] == SETTINGS["rows"]
    assert {"loss", "l0", "fvu", "rows_per_second", "bytes_per_second", "waiting_seconds", "step"} <= events[-1].keys()
    assert events[-1]["l0"] == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expansion": 2.0}, "train.latents = 32 and train.expansion = 2.0; set exactly one of the two"),
        ({"k": 33}, "k = 33 is outside 1 to 32"),
        ({"tap": "nose"}, "no tap 'nose'; it holds toy"),
        ({"target_tap": "nose"}, "no tap 'nose'; it holds toy"),
        ({"variant": "topkk"}, "'topkk' is unknown; did you mean topk?"),
        ({"batch_rows": 10_000}, "fewer than one batch of 10,000"),
        ({"pool_bytes": 100}, "train.pool_bytes = 100 does not hold"),
    ],
)
def test_bad_settings_leave_nothing_behind(store, tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        run(store, tmp_path / "sae", **changes)
    assert message in str(caught.value)
    assert not (tmp_path / "sae").exists()


def test_divergence_stops_the_run_with_the_step(store, tmp_path):
    with pytest.raises(
        SaexError, match=r"the loss is (nan|inf) at step \d+: training has diverged; there is no checkpoint yet"
    ):
        run(store, tmp_path, variant="relu", k=None, sparsity_coefficient=0.1, learning_rate=1e30)


def test_the_decoder_bias_starts_at_the_geometric_median_of_normalised_rows(store, tmp_path):
    settings = {"initial_decoder_bias": "geometric_median", "initial_encoder_bias": "firing_share"}
    run(store, tmp_path, rows=128, learning_rate=1e-9, sample_rows=6000, **settings)
    tensors = read_sae(str(tmp_path)).tensors
    source = ActivationStore(store, ("toy",))
    rows_BD = source.acts("toy", range(source.info.train_windows)).reshape(-1, 12)[:, :]
    rows_BD = rows_BD[source.keep(range(source.info.train_windows)).reshape(-1)].astype(np.float32)
    expected_D = np.asarray(geometric_median(jnp.asarray(rows_BD)))
    spread = np.linalg.norm(rows_BD - rows_BD.mean(0), axis=1).mean()
    np.testing.assert_allclose(tensors["b_dec"], expected_D, atol=0.02 * spread)
    assert np.linalg.norm(rows_BD.mean(0) - expected_D) > 0.05 * spread, "the mean would do as well"
    z_BF = (rows_BD - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    np.testing.assert_allclose((z_BF > 0).mean(axis=0), 0.1, atol=0.02)
