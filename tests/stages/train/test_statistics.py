"""Training starts from what the store says of its rows; it makes no pass of its own over them."""

import json

import numpy as np
import pytest
import two_taps
from small_store import SmallStore, whole_store

from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.checkpoint import read_sae
from saex_pipe.common.formats.statistics import floats_to_text
from saex_pipe.common.formats.zarr_array import Tiling
from saex_pipe.stages.train import run as train
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.rows import open_rows
from saex_pipe.stages.train.units import units_of

SETTINGS = {"k": 2, "latents": 16, "batch_rows": 32, "rows": 32, "compute_dtype": "float32", "learning_rate": 1e-8}


def test_the_decoder_bias_starts_at_the_mean_that_the_manifest_states(tmp_path):
    store = whole_store(tmp_path / "store", windows=48, length=32, tiling=Tiling(8, 4))
    path = tmp_path / "store" / "manifest.json"
    mean_D = ActivationStore(store.uri).statistics("a").mean_D
    for name, shift in (("true", 0.0), ("shifted", 30.0)):
        manifest = json.loads(path.read_text())
        stated = manifest["contents"]["statistics"]["a"]
        stated["sum"] = floats_to_text((mean_D + shift) * stated["count"])
        path.write_text(json.dumps(manifest))
        train.run(Config.create({"store": store.uri, "out": str(tmp_path / name)} | SETTINGS))
        np.testing.assert_allclose(read_sae(str(tmp_path / name)).tensors["b_dec"], mean_D + shift, rtol=1e-3)


@pytest.mark.parametrize(
    ("normalise", "shared"), [("mean_square", True), ("mean_square", False), ("expected_norm", False), ("ema", False)]
)
def test_both_sides_are_scaled_by_what_the_manifest_states(tmp_path, normalise, shared):
    uri, (one, two) = two_taps.write_store(tmp_path / "store"), two_taps.TAPS
    path = tmp_path / "store" / "manifest.json"
    targets = {} if shared else {"target_tap": two}
    config = Config.create(
        {"store": uri, "out": "o", "tap": one, "normalise": normalise, "k": 2, "latents": 16, "rows": 32} | targets
    )

    def scales():
        store, sides = open_rows(config, None)
        found = units_of(config, store, sides, with_rows=False, resumed=False).normalisers
        return [float(side.scale_D[0]) for side in (found.input, found.target)]

    widths = dict(zip(two_taps.TAPS, two_taps.WIDTHS, strict=True))
    store, taps = ActivationStore(uri), [one, one if shared else two]
    rows = {tap: store.acts(tap, range(two_taps.WINDOWS)).astype(np.float64).reshape(-1, widths[tap]) for tap in taps}
    length = {
        tap: np.linalg.norm(rows_BD, axis=1).mean()
        if normalise == "expected_norm"
        else np.sqrt(np.square(rows_BD).sum(axis=1).mean())
        for tap, rows_BD in rows.items()
    }
    true = [np.sqrt(widths[tap]) / length[tap] for tap in taps]
    np.testing.assert_allclose(scales(), true, rtol=0.01 if normalise == "expected_norm" else 1e-6)

    manifest = json.loads(path.read_text())
    stated = manifest["contents"]["statistics"][taps[1]]
    stated["sum_square"] = floats_to_text(4 * store.statistics(taps[1]).sum_square_D)
    stated["norm_histogram"] = {str(int(bin_) + 16): count for bin_, count in stated["norm_histogram"].items()}
    path.write_text(json.dumps(manifest))
    np.testing.assert_allclose(
        scales(), [true[0] / (2 if shared else 1), true[1] / 2], rtol=0.01 if normalise == "expected_norm" else 1e-6
    )


def test_a_transcoder_starts_from_what_the_manifest_states_of_its_target(tmp_path):
    uri, (one, two) = two_taps.write_store(tmp_path / "store"), two_taps.TAPS
    path = tmp_path / "store" / "manifest.json"
    mean_D = ActivationStore(uri).statistics(two).mean_D
    manifest = json.loads(path.read_text())
    stated = manifest["contents"]["statistics"][two]
    stated["sum"] = floats_to_text((mean_D + 30) * stated["count"])
    path.write_text(json.dumps(manifest))
    train.run(Config.create({"store": uri, "out": str(tmp_path / "sae"), "tap": one, "target_tap": two} | SETTINGS))
    np.testing.assert_allclose(read_sae(str(tmp_path / "sae")).tensors["b_dec"], mean_D + 30, rtol=1e-3)


def dead_fraction(path, ratio, decoder_bias):
    """Of a TopK SAE without a remedy for dead latents, on rows that lie ``ratio`` spreads off zero."""
    store = SmallStore(path / "store", windows=256, length=32, tiling=Tiling(32, 8), share_kept=1.0)
    noise_NLD = np.random.default_rng(0).normal(size=store.acts_NLD.shape)
    store.acts_NLD = (noise_NLD + ratio).astype(np.float32)
    store.start().write(*range(len(store.shards))).finish()
    assert ActivationStore(store.uri).statistics("a").mean_to_spread == pytest.approx(ratio, abs=0.02)
    settings = {"store": store.uri, "out": str(path / "sae"), "latents": 128, "k": 4, "auxiliary_coefficient": 0}
    settings |= {"batch_rows": 256, "rows": 16_384, "dead_after_rows": 4096, "initial_decoder_bias": decoder_bias}
    train.run(Config.create(settings | {"compute_dtype": "float32"}))
    lines = [json.loads(line) for line in (path / "sae" / "metrics.jsonl").read_text().splitlines()]
    return [line["dead_fraction"] for line in lines if "dead_fraction" in line][-1]


def test_the_distance_of_the_mean_in_spreads_predicts_dead_latents(tmp_path):
    found = [dead_fraction(tmp_path / str(ratio), ratio, "zero") for ratio in (0, 3, 10)]
    assert found[0] + 0.1 < found[1] < found[2] - 0.1
    assert dead_fraction(tmp_path / "mean", 10, "mean") < found[2] - 0.2, "which a bias at the mean prevents"
