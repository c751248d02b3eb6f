"""What the step itself keeps: the count of rows since each latent fired."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
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
