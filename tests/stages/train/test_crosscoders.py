"""Crosscoders from a store of two taps: training, what is saved, the feature cache, refusals."""

import numpy as np
import pytest
from two_taps import TAPS, write_store

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.checkpoint import read_sae
from saex_pipe.common.formats.feature_cache import FeatureCache
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.saelens import from_saelens
from saex_pipe.stages.cache import run as cache
from saex_pipe.stages.cache.config import Config as CacheConfig
from saex_pipe.stages.train import run as train
from saex_pipe.stages.train.config import Config

SETTINGS = {
    **{"variant": "topk", "latents": 32, "k": 3, "batch_rows": 128, "rows": 128 * 60},
    **{"compute_dtype": "float32", "learning_rate": 1e-2},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("two") / "store")


def run(store, out, **changes):
    return train.run(Config.create({"store": store, "out": str(out), "taps": ("layer.*",)} | SETTINGS | changes))


@pytest.mark.parametrize("normalise", ["mean_square", "whitening_zca", "layer_norm"])
def test_a_saved_crosscoder_reconstructs_every_tap_from_raw_rows(store, tmp_path, normalise):
    run(store, tmp_path, normalise=normalise)
    saved = read_sae(str(tmp_path))
    assert saved.taps == saved.target_taps == TAPS
    assert saved.cfg["architecture"] == "topk_crosscoder"
    assert saved.cfg["tap_widths"] == [12, 8]
    source = ActivationStore(store, TAPS)
    rows = [source.acts(tap, range(20)).reshape(-1, source.info.taps[tap]) for tap in TAPS]
    assert np.abs(rows[0]).mean() > 20 * np.abs(rows[1]).mean(), "only normalisation makes the taps count alike"
    recon_BD = np.asarray(Sae(*from_saelens(saved.cfg, saved.tensors)).reconstruct(np.concatenate(rows, axis=1)))
    for part_BD, recon_part_BD in zip(rows, np.split(recon_BD, [12], axis=1), strict=True):
        assert np.square(part_BD - recon_part_BD).sum() / np.square(part_BD - part_BD.mean(axis=0)).sum() < 0.6


def fvu_of_normalised(rows, recons):
    """Fraction of the variance left unexplained of rows, the taps' parts of which have their own units each."""
    units = [(part_BD.mean(1, keepdims=True), part_BD.std(1, ddof=1, keepdims=True)) for part_BD in rows]
    rows_BD, recon_BD = (
        np.concatenate([(part_BD - mean) / std for part_BD, (mean, std) in zip(side, units, strict=True)], axis=1)
        for side in (rows, recons)
    )
    return np.square(rows_BD - recon_BD).sum() / np.square(rows_BD - rows_BD.mean(axis=0)).sum()


def test_a_crosscoder_with_layer_norm_is_exported_and_imported_as_it_was_trained(store, tmp_path):
    run(store, tmp_path / "sae", normalise="layer_norm")
    everything = {"batch_rows": 256 * 16, "rows": 256 * 16, "learning_rate": 1e-30, "normalise": "layer_norm"}
    manifest = run(store, tmp_path / "on", start_from=str(tmp_path / "sae"), **everything)
    source, saved = ActivationStore(store, TAPS), read_sae(str(tmp_path / "on"))
    assert saved.cfg["normalize_activations"] == "layer_norm"
    for name, tensor in read_sae(str(tmp_path / "sae")).tensors.items():
        np.testing.assert_allclose(saved.tensors[name], tensor, rtol=1e-6, atol=1e-7, err_msg=name)
    rows = [source.acts(tap, range(256)).reshape(-1, source.info.taps[tap]).astype(np.float64) for tap in TAPS]
    raw_BD = np.concatenate(rows, axis=1, dtype=np.float32)
    recon_BD = np.asarray(Sae(*from_saelens(saved.cfg, saved.tensors)).reconstruct(raw_BD), np.float64)
    found = fvu_of_normalised(rows, np.split(recon_BD, [12], axis=1))
    assert found == pytest.approx(manifest.contents["last_step"]["fvu"], rel=1e-4)
    assert found < 0.6


@pytest.mark.parametrize("normalise", ["mean_square", "layer_norm"])
def test_the_feature_cache_encodes_all_taps_of_a_crosscoder(store, tmp_path, normalise):
    run(store, tmp_path / "sae", normalise=normalise)
    cache.run(CacheConfig(store=store, sae=str(tmp_path / "sae"), out=str(tmp_path / "cache"), max_tokens=64 * 16))
    saved, source = read_sae(str(tmp_path / "sae")), ActivationStore(store, TAPS)
    rows_BD = np.concatenate([source.acts(tap, range(64)).reshape(-1, source.info.taps[tap]) for tap in TAPS], axis=1)
    sae = Sae(*from_saelens(saved.cfg, saved.tensors), Compute(dtype="bfloat16"))
    with FeatureCache(Folder(str(tmp_path / "cache"))) as features:
        counts = features.features(["firing_count"])["firing_count"].to_numpy()
    np.testing.assert_array_equal(counts, (np.asarray(sae.encode(rows_BD)) > 0).sum(axis=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": ("layer.0",)}, "train.taps = layer.0 is one tap"),
        ({"taps": ("layer.0", "nose")}, "has no tap 'nose'; it holds layer.0, layer.1"),
        ({"tap": "layer.0"}, "train.taps and train.tap or target_tap contradict each other"),
        (
            {"taps": (), "tap": "layer.0", "target_tap": "layer.1", "normalise": "layer_norm"},
            "a reconstruction gets back the mean and spread of its own row, and a transcoder does not see the target's",
        ),
        ({"skip": True}, "skip = true without a target"),
    ],
)
def test_what_several_taps_cannot_be_is_refused(store, tmp_path, changes, message):
    with pytest.raises(InputError) as refusal:
        run(store, tmp_path / "sae", **changes)
    assert message in str(refusal.value)
    assert not (tmp_path / "sae").exists()
