"""What only JumpReLU has: three forms, gradients straight through a jump, thresholds that move and stay float32."""

import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sae_references import jumprelu as reference

from saex_pipe.common.sae.compute import PLAIN
from saex_pipe.common.sae.contract import Moment, Params
from saex_pipe.common.sae.counted import SHARES
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.jumprelu import PUBLISHED, JumpRelu
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.optimiser import adam
from saex_pipe.common.sae.schedules import penalty_factor
from saex_pipe.common.sae.straight_through import above, jump, rows_above
from saex_pipe.common.sae.train_step import StepSettings, init_state, make_step
from saex_pipe.common.sae.variants import build

LATENTS = 48


def start(variant: JumpRelu, x_BD: jax.Array) -> Params:
    mean_D, rng = x_BD.mean(axis=0), np.random.default_rng(5)
    params = variant.init(jax.random.key(0), DataStats(mean_D, mean_D, x_BD, x_BD))
    return {key: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for key, leaf in params.items()}


@pytest.mark.parametrize("to_input", [False, True])
def test_gradients_of_jump_and_step_in_closed_form(to_input: bool) -> None:
    """One latent, threshold 2, bandwidth 1: rows below, near from below, near from above, far above."""
    z_BF, threshold_F = jnp.array([[1.25], [1.75], [2.25], [4.0]]), jnp.array([2.0])
    weight_BF = jnp.array([[1.0], [10.0], [100.0], [1000.0]])

    assert jump(z_BF, threshold_F, 1.0, to_input).ravel().tolist() == [0, 0, 2.25, 4]
    dz, dtheta = jax.grad(lambda z, t: jnp.sum(weight_BF * jump(z, t, 1.0, to_input)), argnums=(0, 1))(
        z_BF, threshold_F
    )
    assert dz.ravel().tolist() == ([0, 20, 300, 1000] if to_input else [0, 0, 100, 1000])
    assert dtheta.tolist() == [-2.0 * 110]
    assert rows_above(z_BF, threshold_F, 1.0).tolist() == [2]
    dz, dtheta = jax.grad(lambda z, t: 5 * rows_above(z, t, 1.0)[0], argnums=(0, 1))(z_BF, threshold_F)
    assert dz.ravel().tolist() == [0, 0, 0, 0]
    assert dtheta.tolist() == [-5.0 * 2]  # two rows are near
    assert above(z_BF, threshold_F).ravel().tolist() == [0, 0, 2.25, 4]
    assert above(-z_BF, -threshold_F).ravel().tolist() == [0, 0, 0, 0]  # a code is never negative


@pytest.mark.parametrize("form", PUBLISHED)
@pytest.mark.parametrize("transcoder", [False, True])
def test_each_form_and_its_gradients_equal_the_equations(
    form: str, transcoder: bool, toy_rows: Callable[..., jax.Array]
) -> None:
    variant = build("jumprelu", LATENTS, jumprelu_form=form, **reference.SETTINGS, transcoder=transcoder)
    x_BD = toy_rows(0)
    params = start(variant, x_BD)
    at = Moment.plain(LATENTS)._replace(dead_F=jnp.arange(LATENTS) < 10, sparsity_scale=jnp.float32(0.5))
    value, gradients = jax.jit(jax.value_and_grad(lambda p: variant.loss(p, x_BD, x_BD, at)[0]))(params)
    exact, rows_BD = {key: np.asarray(leaf, np.float64) for key, leaf in params.items()}, np.asarray(x_BD, np.float64)
    assert float(value) == pytest.approx(reference.loss(exact, exact, rows_BD, rows_BD, at, transcoder, form), rel=1e-5)
    expected = reference.gradients(exact, rows_BD, rows_BD, at, transcoder, form)
    assert expected.keys() == params.keys()
    for key, leaf in expected.items():
        assert np.abs(leaf).max() > 0
        np.testing.assert_allclose(gradients[key], leaf, rtol=1e-4, atol=1e-5 * np.abs(leaf).max(), err_msg=key)


def from_edges(over_BF: jax.Array) -> float:
    """How near to a threshold, or to half a bandwidth from it, the nearest is."""
    return float(jnp.abs(jnp.stack([over_BF, jnp.abs(over_BF) - reference.BANDWIDTH / 2])).min())


@pytest.mark.parametrize(("name", "form"), [("jumprelu", "l0"), ("jumprelu", "tanh"), ("matryoshka_jumprelu", "tanh")])
def test_where_few_are_active_codes_below_their_threshold_get_a_gradient_too(
    name: str, form: str, toy_rows: Callable[..., jax.Array]
) -> None:
    """By way of active codes alone the gradient of a code of 0 would be left out, and with it half of the jump's."""
    many, x_BD = 1024, toy_rows(0)
    equations = importlib.import_module(f"sae_references.{name}")
    variant = build(name, many, jumprelu_form=form, **equations.SETTINGS)
    params, at = start(variant, x_BD), Moment.plain(many)
    over_BF = variant.pre_activations(params, x_BD, PLAIN) - params["threshold_F"][None]
    least = jnp.quantile(over_BF, 1 - 4 / many) + reference.BANDWIDTH / 2
    shift = max(np.linspace(least, least + 1e-3, 20, dtype=np.float32), key=lambda shift: from_edges(over_BF - shift))
    assert from_edges(over_BF - shift) > 2e-6  # which rounding puts nothing on the other side of
    params, over_BF = variant.shift_pre_activations(params, jnp.full(many, -shift)), over_BF - shift
    near_BF = jnp.abs(over_BF) < reference.BANDWIDTH / 2
    assert int((near_BF & (over_BF < 0)).sum()) > x_BD.shape[0]
    assert int((near_BF | (over_BF > 0)).sum()) < x_BD.shape[0] * (many // SHARES[-1] - 1)
    gradients = jax.jit(jax.grad(lambda p: variant.loss(p, x_BD, x_BD, at)[0]))(params)
    exact, rows_BD = {key: np.asarray(leaf, np.float64) for key, leaf in params.items()}, np.asarray(x_BD, np.float64)
    for key, leaf in equations.gradients(exact, rows_BD, rows_BD, at, False, form).items():
        np.testing.assert_allclose(gradients[key], leaf, rtol=1e-4, atol=1e-5 * np.abs(leaf).max(), err_msg=key)


def test_a_form_comes_with_what_it_is_published_with() -> None:
    variant = build("jumprelu", 64, sparsity_coefficient=1.0, jumprelu_form="l0", threshold_start=0.5)
    assert (variant.decoder_rows, variant.centred, variant.bandwidth) == ("unit", True, 0.03)
    assert variant.threshold_start == 0.5  # what is set stays
    assert build("jumprelu", 64, sparsity_coefficient=1.0) == JumpRelu(latents=64, sparsity_coefficient=1.0)


@pytest.mark.parametrize("form", PUBLISHED)
def test_at_the_start_latents_reach_their_thresholds_however_short_the_columns(
    form: str, toy_rows: Callable[..., jax.Array]
) -> None:
    x_BD = toy_rows(0)
    variant = build("jumprelu", 16 * 128, sparsity_coefficient=1.0, jumprelu_form=form)
    params = variant.init(jax.random.key(0), DataStats(x_BD.mean(axis=0), x_BD.mean(axis=0), x_BD, x_BD))
    assert float(jnp.linalg.norm(params["w_enc_FD"], axis=1).max()) < 0.02
    assert float((variant.encode(params, x_BD) > 0).mean()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(("form", "factor"), [("tanh", 0.25), ("l0", 1.0), ("target_l0", 1.0)])
def test_the_penalty_of_tanh_rises_over_the_whole_run(form: str, factor: float) -> None:
    variant = build("jumprelu", LATENTS, sparsity_coefficient=1.0, jumprelu_form=form)
    warmup = variant.published_sparsity_warmup()
    assert float(penalty_factor(warmup, 100, jnp.float32(0.25))) == factor


def test_thresholds_move_at_their_own_rate_in_float32_and_stay_at_or_above_zero(
    toy_rows: Callable[..., jax.Array],
) -> None:
    x_BD, optimiser, rate = toy_rows(0), adam(10), 1e-3
    moved = {}
    for threshold_rate in (1.0, 0.1):
        variant = JumpRelu(latents=LATENTS, sparsity_coefficient=1.0, threshold_rate=threshold_rate)
        params = variant.init(jax.random.key(0), DataStats(x_BD.mean(axis=0), x_BD.mean(axis=0), x_BD, x_BD))
        same = Normaliser(jnp.ones(16))
        state = init_state(params, optimiser, Normalisers(same, same))
        state, _ = jax.jit(make_step(optimiser, StepSettings(total_steps=10)))(
            variant, jnp.float32(rate), state, x_BD, x_BD
        )
        assert state.params["threshold_F"].dtype == jnp.float32
        moved[threshold_rate] = np.abs(np.asarray(state.params["threshold_F"] - params["threshold_F"]))
        kept = variant.constrain({**state.params, "threshold_F": jnp.arange(-24.0, 24.0)})
        np.testing.assert_array_equal(kept["threshold_F"], np.maximum(np.arange(-24, 24), 0))
    np.testing.assert_allclose(np.median(moved[1.0]), rate, rtol=0.01)  # Adam's first step is as long as the rate
    np.testing.assert_allclose(moved[0.1], moved[1.0] / 10, rtol=1e-3)


@pytest.mark.parametrize("limit", [0.5, 0.05])
def test_target_l0_is_reached_unless_latents_would_fire_too_often(
    limit: float, toy_rows: Callable[..., jax.Array]
) -> None:
    settings = {"sparsity_coefficient": 30.0, "target_l0": 5.0, "bandwidth": 0.2, "frequency_limit": limit}
    variant = build("jumprelu", LATENTS, jumprelu_form="target_l0", initial_encoder_bias="centred", **settings)
    optimiser, same = adam(300), Normaliser(jnp.ones(16))
    rows = [toy_rows(seed) for seed in range(4)]
    state = init_state(start(variant, rows[0]), optimiser, Normalisers(same, same))
    step = jax.jit(make_step(optimiser, StepSettings(total_steps=300)))
    found = []
    for i in range(300):
        state, terms = step(variant, jnp.float32(1e-2), state, rows[i % 4], rows[i % 4])
        found.append(float(terms.l0))
    assert found[0] > 10
    l0, often = np.mean(found[-20:]), float(jnp.max((variant.encode(state.params, rows[0]) > 0).mean(axis=0)))
    if limit == 0.5:
        assert l0 == pytest.approx(5.0, abs=0.5)
        assert often > 0.15
    else:
        assert l0 < 4  # 48 latents at a twentieth of the rows each are 2.4
        assert often < 0.15
