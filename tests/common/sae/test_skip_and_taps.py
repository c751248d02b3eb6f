"""The skip path of every variant, and crosscoders as sums over their taps written out in NumPy."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae.contract import Moment, Params, Variant
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.variants import VARIANTS, build

WIDTH, OUT, LATENTS, ROWS = 16, 10, 48, 64
TAP_WIDTHS = (6, 10)


def batch() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x_BD = rng.exponential(size=(ROWS, WIDTH)).astype(np.float32)
    return jnp.asarray(x_BD), jnp.asarray(np.tanh(x_BD[:, :OUT]))


def trained(variant: Variant, width_out: int) -> Params:
    x_BD, y_BD = batch()
    target_BD = y_BD if width_out == OUT else x_BD
    params = variant.init(jax.random.key(0), DataStats(jnp.ones(WIDTH), jnp.ones(width_out), x_BD, target_BD))
    rng = np.random.default_rng(1)
    return {name: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in params.items()}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_what_goes_past_the_latents_is_taken_off_the_target(name: str) -> None:
    settings = importlib.import_module(f"sae_references.{name}").SETTINGS
    settings = {**settings, "transcoder": True, "reconstruction": "squared"}
    plain, skipping = build(name, LATENTS, **settings), build(name, LATENTS, **settings, skip=True)
    x_BD, y_BD = batch()
    params = trained(skipping, OUT)
    past_BD = x_BD @ params["w_skip_DD"]
    assert float(jnp.abs(past_BD).mean()) > 0.1
    at = Moment.plain(LATENTS)._replace(dead_F=jnp.arange(LATENTS) < 20)
    loss, terms = skipping.loss(params, x_BD, y_BD, at)
    expected, plain_terms = plain.loss(params, x_BD, y_BD - past_BD, at)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(terms.l0) == float(plain_terms.l0), "the skip path is no latent"
    np.testing.assert_allclose(
        skipping.reconstruct(params, x_BD), plain.reconstruct(params, x_BD) + past_BD, rtol=1e-4, atol=1e-5
    )


def test_the_skip_path_learns_by_the_error_of_the_reconstruction() -> None:
    variant = build("relu", LATENTS, sparsity_coefficient=0.5, transcoder=True, skip=True)
    params, (x_BD, y_BD) = trained(variant, OUT), batch()
    gradients = jax.grad(lambda params: variant.loss(params, x_BD, y_BD, Moment.plain(LATENTS))[0])(params)
    error_BD = np.asarray(variant.reconstruct(params, x_BD) - y_BD, np.float64)
    expected_DD = 2 / ROWS * np.asarray(x_BD, np.float64).T @ error_BD
    np.testing.assert_allclose(gradients["w_skip_DD"], expected_DD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "penalised"), [("relu", True), ("topk", False)])
def test_a_crosscoder_is_a_sum_over_its_taps(name: str, penalised: bool) -> None:
    settings = {"sparsity_coefficient": 0.7} if penalised else {"k": 5, "reconstruction": "squared"}
    variant = build(name, LATENTS, **settings, tap_widths=TAP_WIDTHS)
    params = {key: np.asarray(leaf, np.float64) for key, leaf in trained(variant, WIDTH).items()}
    x_BD = np.asarray(batch()[0], np.float64)
    cuts, start = [], 0
    for width in TAP_WIDTHS:
        cuts.append(slice(start, start + width))
        start += width
    z_BF = np.tile(params["b_enc_F"], (ROWS, 1))
    for tap in cuts:
        subtracted_D = params["b_dec_D"][tap] if variant.subtracts_decoder_bias else 0
        z_BF += (x_BD[:, tap] - subtracted_D) @ params["w_enc_FD"].T[tap]
    codes_BF = np.maximum(z_BF, 0)
    if name == "topk":
        codes_BF *= z_BF >= np.sort(z_BF, axis=1)[:, -5:-4]
    expected, norms_F = 0.0, np.zeros(LATENTS)
    for tap in cuts:
        error_BD = x_BD[:, tap] - codes_BF @ params["w_dec_FD"][:, tap] - params["b_dec_D"][tap]
        expected += (error_BD**2).sum() / ROWS
        norms_F += np.sqrt((params["w_dec_FD"][:, tap] ** 2).sum(axis=1))
    if penalised:
        expected += 0.7 * (codes_BF @ norms_F).mean()
    params32 = {key: jnp.asarray(leaf, jnp.float32) for key, leaf in params.items()}
    x32_BD = batch()[0]
    loss, _ = variant.loss(params32, x32_BD, x32_BD, Moment.plain(LATENTS))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(variant.encode(params32, x32_BD), codes_BF, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variant.decoder_norms(params32), norms_F, rtol=1e-5)
    one_tap = build(name, LATENTS, **settings)
    if penalised:
        assert float(one_tap.loss(params32, x32_BD, x32_BD, Moment.plain(LATENTS))[0]) < 0.99 * expected
