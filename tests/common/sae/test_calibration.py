"""The thresholds of a BatchTopK SAE have the L0 of training, and keep it when a scale is folded into the weights."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sae_references import batchtopk as reference

from saex_pipe.common.mesh import make_mesh
from saex_pipe.common.sae.batchtopk import BatchTopK
from saex_pipe.common.sae.calibration import calibrated
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Params
from saex_pipe.common.sae.folding import fold
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.initial import DataStats, Initial
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.sharding import shardings

WIDTH, LATENTS, K = 16, 48, reference.K


def start(variant: BatchTopK) -> Params:
    rng = np.random.default_rng(0)
    variant = replace(variant, initial=Initial(encoder_norm=1.0))  # beside which the noise below is small
    params = variant.init(jax.random.key(0), DataStats(jnp.full(WIDTH, 0.5), jnp.full(WIDTH, 0.5)))
    return {key: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for key, leaf in params.items()}


def active(sae: Sae, batches: list[jax.Array]) -> int:
    return sum(int(jnp.sum(sae.encode(x_BD) > 0)) for x_BD in batches)


@pytest.mark.parametrize("loud", [1.0, 4.0])  # at 4 one batch has far more than twice its share of the active latents
def test_the_mean_l0_is_that_of_training(loud: float, toy_rows: Callable[..., jax.Array]) -> None:
    variant = BatchTopK(latents=LATENTS, k=K)
    params, batches = start(variant), [toy_rows(seed) for seed in range(4)]
    batches[2] = loud * batches[2]
    passes = 0

    def again() -> list[jax.Array]:
        nonlocal passes
        passes += 1
        return batches

    found = calibrated(variant, params, again)
    assert passes == (1 if loud == 1.0 else 2)
    exact = {key: np.asarray(leaf, np.float64) for key, leaf in params.items()}
    trained = [reference.training_codes(exact, np.asarray(x_BD, np.float64), False) for x_BD in batches]
    assert active(Sae(variant, found), batches) == sum((codes_BF > 0).sum() for codes_BF in trained) == K * 96 * 4
    # What the threshold separates, from a sort of all codes of all batches.
    every_N = np.sort([reference.training_codes(exact, np.asarray(x), False, LATENTS) for x in batches], axis=None)
    np.testing.assert_allclose(found["threshold_F"], every_N[-K * 96 * 4 - 1], rtol=1e-5)
    usual = np.mean([codes_BF[codes_BF > 0].min() for codes_BF in trained])  # E[smallest selected]
    counts = active(Sae(variant, {**params, "threshold_F": jnp.full(LATENTS, usual, jnp.float32)}), batches)
    assert abs(counts / (K * 96 * 4) - 1) > (0.0 if loud == 1.0 else 0.03)  # has not the L0 of training
    assert all(found[key] is params[key] for key in params if key != "threshold_F")


@pytest.mark.parametrize("ranked", [False, True])
def test_the_thresholds_hold_for_raw_rows_once_a_scale_is_folded(
    ranked: bool, toy_rows: Callable[..., jax.Array]
) -> None:
    variant = BatchTopK(latents=LATENTS, k=K, rank_by_decoder_norm=ranked, decoder_rows="free")
    params, raw = start(variant), [40 * toy_rows(seed) for seed in range(3)]
    params["w_dec_FD"] *= jnp.linspace(0.2, 3.0, LATENTS)[:, None]
    normaliser = Normaliser(jnp.full(WIDTH, 1 / 40))
    found = calibrated(variant, params, lambda: [normaliser.apply(x_BD) for x_BD in raw])
    norms_F = np.linalg.norm(params["w_dec_FD"], axis=1)
    compared_F = np.asarray(found["threshold_F"]) * (norms_F if ranked else 1)
    np.testing.assert_allclose(compared_F, compared_F[0], rtol=1e-5)  # one threshold, in the units of what is compared
    assert active(Sae(variant, fold(variant, found, Normalisers(normaliser, normaliser))), raw) == pytest.approx(
        K * 96 * 3, abs=2
    )


@pytest.mark.parametrize("k", [K, 40])  # at 40 a device's largest are all of its own, and fewer are positive than asked
def test_a_mesh_finds_the_same_thresholds(k: int, toy_rows: Callable[..., jax.Array]) -> None:
    variant, mesh = BatchTopK(latents=LATENTS, k=k), make_mesh(4)
    params, batches = start(variant), [toy_rows(seed) for seed in range(3)]
    batches[2] = 6 * batches[2]
    placed = jax.device_put(params, shardings(params, LATENTS, mesh))
    found = calibrated(variant, placed, lambda: batches, Compute(mesh=mesh))
    expected = calibrated(variant, params, lambda: batches)
    assert (float(expected["threshold_F"][0]) > 0) == (k == K)
    np.testing.assert_allclose(found["threshold_F"], expected["threshold_F"], rtol=1e-6)


def test_where_fewer_codes_are_positive_than_asked_for_all_of_them_count(toy_rows: Callable[..., jax.Array]) -> None:
    variant = BatchTopK(latents=LATENTS, k=40)
    params = start(variant)
    found = calibrated(variant, params, lambda: [toy_rows(0)])
    assert (np.asarray(found["threshold_F"]) == 0).all()
    assert active(Sae(variant, found), [toy_rows(0)]) < 40 * 96
