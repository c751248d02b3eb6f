"""Initial parameters: what each kind promises, on normalised rows, under jit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae import initial
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.geometric_median import geometric_median
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.variants import build

WIDTH, OUT, LATENTS, ROWS = 16, 10, 48, 400
RELU = {"sparsity_coefficient": 1.0}


def stats(width_out: int = WIDTH) -> DataStats:
    rng = np.random.default_rng(0)
    x_ND = jnp.asarray(rng.exponential(size=(ROWS, WIDTH)) + 1, jnp.float32)
    y_ND = x_ND if width_out == WIDTH else jnp.tanh(x_ND[:, :width_out])
    return DataStats(x_ND.mean(axis=0), y_ND.mean(axis=0), x_ND, y_ND)


def started(variant: Variant, width_out: int = WIDTH) -> Params:
    return jax.jit(variant.init)(jax.random.key(0), stats(width_out))


def relu(**settings: Any) -> Variant:
    return build("relu", LATENTS, **RELU, **{f"initial_{name}": value for name, value in settings.items()})


def test_an_orthogonal_encoder_is_one_basis_after_another() -> None:
    w_enc_FD = started(relu(encoder="orthogonal", decoder="kaiming"))["w_enc_FD"]
    bases = np.asarray(w_enc_FD).reshape(3, WIDTH, WIDTH)
    np.testing.assert_allclose(bases @ bases.transpose(0, 2, 1), np.tile(np.eye(WIDTH), (3, 1, 1)), atol=1e-5)
    assert np.abs(bases[0] - bases[1]).max() > 0.1


def test_a_kaiming_encoder_has_variance_two_over_the_width_and_is_uniform() -> None:
    w_enc_FD = np.asarray(started(relu(encoder="kaiming"))["w_enc_FD"])
    limit = np.sqrt(6 / WIDTH)
    assert 0.98 * limit < np.abs(w_enc_FD).max() <= limit
    assert w_enc_FD.var() == pytest.approx(2 / WIDTH, rel=0.1)


@pytest.mark.parametrize("decoder", ["unit", "kaiming", "orthogonal"])
def test_rows_of_the_decoder_have_the_length_asked_for_and_the_encoder_is_their_transpose(decoder: str) -> None:
    params = started(relu(decoder=decoder, decoder_norm=0.3))
    np.testing.assert_allclose(np.linalg.norm(params["w_dec_FD"], axis=1), 0.3, rtol=1e-5)
    np.testing.assert_array_equal(params["w_enc_FD"], params["w_dec_FD"])
    longer = started(relu(decoder=decoder, decoder_norm=0.3, encoder_norm=0.6))
    np.testing.assert_allclose(longer["w_enc_FD"], 2 * params["w_dec_FD"], rtol=1e-6)


@pytest.mark.parametrize("name", ["gated", "p_annealing", "relu", "wright"])
def test_at_the_start_a_wide_sae_does_not_overshoot(name: str) -> None:
    """Its reconstruction is about as long as the input, or shorter, however many latents are active."""
    width, latents = 32, 2048
    x_BD = jax.random.normal(jax.random.key(1), (256, width))
    params = build(name, latents, **RELU).init(jax.random.key(0), DataStats(jnp.zeros(width), jnp.zeros(width)))
    variant = build(name, latents, **RELU)
    recon_BD = variant.decode(params, variant.encode(params, x_BD))
    along = float(jnp.sum(recon_BD * x_BD) / jnp.sum(x_BD**2))
    assert 0.2 < along < 1.1


def test_the_default_rate_is_the_published_one_or_turns_short_runs_faster() -> None:
    topk = build("topk", 2**14, k=8)
    assert topk.default_learning_rate(768, 10**8) == 2e-4
    assert topk.default_learning_rate(768, 10_000) == pytest.approx(0.02 / 768**0.5)
    assert topk.default_learning_rate(768, 4) == pytest.approx(0.1 / 768**0.5)


@pytest.mark.parametrize("latents", [LATENTS, 12])
def test_a_pseudo_inverse_is_that_of_the_encoder(latents: int) -> None:
    variant = build("relu", latents, **RELU, initial_encoder="kaiming", initial_decoder="pseudo_inverse")
    params = started(variant)
    expected_FD = np.linalg.pinv(np.asarray(params["w_enc_FD"], np.float64).T)
    np.testing.assert_allclose(params["w_dec_FD"], expected_FD, rtol=1e-3, atol=1e-4 * np.abs(expected_FD).max())


def test_the_decoder_bias_is_zero_mean_or_geometric_median() -> None:
    known = stats()
    expected = {
        "zero": np.zeros(WIDTH),
        "mean": known.target_mean_D,
        "geometric_median": geometric_median(known.target_rows_ND),
    }
    for kind, expected_D in expected.items():
        np.testing.assert_allclose(started(relu(decoder_bias=kind))["b_dec_D"], expected_D, rtol=1e-6)
    assert np.abs(expected["mean"] - expected["geometric_median"]).max() > 0.05


@pytest.mark.parametrize("decoder_bias", ["zero", "mean", "geometric_median"])
@pytest.mark.parametrize("centred", [False, True])
def test_a_centred_encoder_bias_gives_pre_activations_of_mean_zero(decoder_bias: str, centred: bool) -> None:
    variant = build("relu", LATENTS, **RELU, centred=centred, initial_decoder_bias=decoder_bias)
    params, known = started(variant), stats()
    x_ND = np.asarray(known.input_rows_ND) - (np.asarray(params["b_dec_D"]) if centred else 0)
    z_NF = x_ND @ np.asarray(params["w_enc_FD"]).T + np.asarray(params["b_enc_F"])
    np.testing.assert_allclose(z_NF.mean(axis=0), 0, atol=1e-6)
    zero = build("relu", LATENTS, **RELU, centred=centred, initial_encoder_bias="zero")
    np.testing.assert_array_equal(started(zero)["b_enc_F"], 0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("relu", RELU),
        ("relu", {**RELU, "centred": True}),
        ("jumprelu", {**RELU, "threshold_start": 0.7}),
        ("gated", RELU),
        ("relu", {**RELU, "transcoder": True}),
    ],
)
def test_every_latent_fires_on_the_share_of_rows_asked_for(name: str, settings: dict[str, Any]) -> None:
    share = 0.05
    variant = build(name, LATENTS, **settings, initial_encoder_bias="firing_share", initial_firing_share=share)
    width_out = OUT if variant.transcoder else WIDTH
    params = started(variant, width_out)
    fires_NF = np.asarray(variant.encode(params, stats(width_out).input_rows_ND)) > 0
    np.testing.assert_array_equal(fires_NF.sum(axis=0), round(share * ROWS))


def test_so_many_latents_fire_on_a_row_unless_a_share_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = relu(encoder_bias="firing_share")
    fires = np.asarray(variant.encode(started(variant), stats().input_rows_ND)) > 0
    assert fires.mean() == pytest.approx(0.1), "10,000 of 48 are more than a tenth"
    monkeypatch.setattr(initial, "LATENTS_FIRING", 3)
    fires = (
        np.asarray(
            variant.encode(jax.jit(lambda key: variant.init(key, stats()))(jax.random.key(0)), stats().input_rows_ND)
        )
        > 0
    )
    assert fires.sum(axis=1).mean() == pytest.approx(3)


def test_a_skip_transcoder_starts_by_predicting_the_mean_of_its_target() -> None:
    variant = build(
        "relu", LATENTS, **RELU, transcoder=True, skip=True, initial_encoder="kaiming", initial_decoder="zero"
    )
    params, known = started(variant, OUT), stats(OUT)
    assert params["w_skip_DD"].shape == (WIDTH, OUT)
    recon_ND = variant.reconstruct(params, known.input_rows_ND)
    np.testing.assert_allclose(recon_ND, np.tile(known.target_mean_D, (ROWS, 1)), rtol=1e-6)
    assert float((variant.encode(params, known.input_rows_ND) > 0).mean()) > 0.3, "its latents are alive"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_decoder": "pseudo_inverse"}, "a pseudo_inverse decoder and an encoder that is its transpose"),
        ({"initial_decoder": "zero"}, "a zero decoder and an encoder that is its transpose"),
        (
            {"initial_decoder": "zero", "initial_encoder": "kaiming", "decoder_rows": "unit"},
            "a decoder of zeros cannot have rows of unit length",
        ),
        (
            {"initial_decoder": "pseudo_inverse", "initial_encoder": "kaiming", "transcoder": True},
            "a pseudo-inverse of the encoder has rows of 16, the target has 10",
        ),
    ],
)
def test_starts_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        started(build("relu", LATENTS, **RELU, **settings), OUT)
    assert message in str(refusal.value)
