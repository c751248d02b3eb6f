"""What the step itself keeps: the count of rows since each latent fired."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.optimiser import adam
from saex_pipe.common.sae.relu import Relu
from saex_pipe.common.sae.train_step import MAX_ROWS_COUNTED, StepSettings, init_state, make_step

RELU = Relu(latents=40, sparsity_coefficient=1.0)
ROWS = 64


def test_rows_since_a_latent_fired_are_counted(toy_rows: Callable[..., jax.Array]) -> None:
    x_BD = toy_rows(0, ROWS)
    params = RELU.init(jax.random.key(0), DataStats(x_BD.mean(axis=0), x_BD.mean(axis=0)))
    params["b_enc_F"] = jnp.where(jnp.arange(40) < 10, -100.0, params["b_enc_F"])  # ten that no input reaches
    optimiser, still, same = adam(10), jnp.float32(0), Normaliser(jnp.ones(16))
    step = jax.jit(make_step(optimiser, StepSettings(total_steps=10, dead_after_rows=2 * ROWS)))
    state = init_state(params, optimiser, Normalisers(same, same))
    fired_F = np.asarray((RELU.encode(params, x_BD) > 0).any(axis=0))
    assert not fired_F[:10].any()
    assert fired_F.any()
    for done in (1, 2, 3):
        state, terms = step(RELU, still, state, x_BD, x_BD)
        np.testing.assert_array_equal(state.rows_since_fired_F, np.where(fired_F, 0, ROWS * done))
        assert float(terms.dead_fraction) == pytest.approx(np.mean(~fired_F) if done == 3 else 0.0)
    late = state._replace(rows_since_fired_F=jnp.full(40, MAX_ROWS_COUNTED + ROWS, jnp.int32))
    after, _ = step(RELU, still, late, x_BD, x_BD)
    np.testing.assert_array_equal(after.rows_since_fired_F, np.where(fired_F, 0, MAX_ROWS_COUNTED + ROWS))


def test_micro_batches_add_up_to_the_batch_where_the_loss_is_a_mean_of_rows(toy_rows: Callable[..., jax.Array]) -> None:
    x_BD = toy_rows(0, ROWS)
    params = RELU.init(jax.random.key(0), DataStats(x_BD.mean(axis=0), x_BD.mean(axis=0)))
    same = Normaliser(jnp.ones(16))
    optimiser = optax.identity()  # moves the parameters by the gradient itself
    found = {}
    for parts in (1, 4):
        step = jax.jit(make_step(optimiser, StepSettings(total_steps=10, micro_batches=parts)))
        found[parts] = step(
            RELU, jnp.float32(-1e-3), init_state(params, optimiser, Normalisers(same, same)), x_BD, x_BD
        )
    (whole, terms), (cut, terms_cut) = found[1], found[4]
    for key, leaf in whole.params.items():
        assert np.abs(leaf - params[key]).max() > 1e-5
        np.testing.assert_allclose(cut.params[key] - params[key], leaf - params[key], rtol=1e-3, atol=1e-7)
    for name in ("total", "reconstruction", "sparsity", "l0"):
        assert float(getattr(terms_cut, name)) == pytest.approx(float(getattr(terms, name)), rel=1e-5)
    np.testing.assert_array_equal(cut.rows_since_fired_F, whole.rows_since_fired_F)
    np.testing.assert_allclose(cut.frequency_F, whole.frequency_F)


def test_averages_of_the_parameters_in_closed_form(toy_rows: Callable[..., jax.Array]) -> None:
    x_BD = toy_rows(0, ROWS)
    params = RELU.init(jax.random.key(0), DataStats(x_BD.mean(axis=0), x_BD.mean(axis=0)))
    optimiser, same = adam(10), Normaliser(jnp.ones(16))
    step = jax.jit(make_step(optimiser, StepSettings(total_steps=10, average_decay=0.7)))
    state = init_state(params, optimiser, Normalisers(same, same), averaged=True)
    seen = [params]
    for _ in range(3):
        state, _ = step(RELU, jnp.float32(1e-2), state, x_BD, x_BD)
        seen.append(state.params)
    for key, mean in state.averages.items():
        expected = sum(w * np.float64(p[key]) for w, p in zip((0.343, 0.147, 0.21, 0.3), seen, strict=True))
        np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
        assert np.abs(mean - state.params[key]).max() > 1e-4
