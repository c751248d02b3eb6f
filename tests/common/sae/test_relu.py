"""What only the ReLU variant has: the warm-up of its penalty and the folding of decoder norms."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae.contract import Moment
from saex_pipe.common.sae.folding import fold_decoder_norms
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.optimiser import adam
from saex_pipe.common.sae.relu import Relu
from saex_pipe.common.sae.train_step import StepSettings, init_state, make_step

RELU = Relu(latents=40, sparsity_coefficient=2.0)


def test_penalty_rises_linearly_over_the_warmup(toy_rows: Callable[..., jax.Array]) -> None:
    x_BD = toy_rows(0)
    params = RELU.init(jax.random.key(0), DataStats(x_BD.mean(axis=0), x_BD.mean(axis=0)))
    optimiser, still, same = adam(10), jnp.float32(0), Normaliser(jnp.ones(16))  # only the schedule changes the penalty
    settings = StepSettings(total_steps=10, sparsity_schedule=lambda done: jnp.minimum(1.0, done / 0.4))
    step = jax.jit(make_step(optimiser, settings))
    state, penalties = init_state(params, optimiser, Normalisers(same, same)), []
    for _ in range(6):
        state, terms = step(RELU, still, state, x_BD, x_BD)
        penalties.append(float(terms.sparsity))
        assert float(terms.total) == pytest.approx(float(terms.reconstruction + terms.sparsity))
    full = float(RELU.loss(params, x_BD, x_BD, Moment.plain(40))[1].sparsity)
    np.testing.assert_allclose(penalties, full * np.array([0, 0.25, 0.5, 0.75, 1, 1]), rtol=1e-5)


def test_folding_decoder_norms_keeps_reconstructions_and_the_penalty(toy_rows: Callable[..., jax.Array]) -> None:
    x_BD = toy_rows(0)
    params = RELU.init(jax.random.key(0), DataStats(x_BD.mean(axis=0), x_BD.mean(axis=0)))
    lengths_F = jnp.linspace(0.0, 3.0, 40)  # one row is 0: it must stay so, without NaN
    params = {**params, "w_dec_FD": params["w_dec_FD"] * lengths_F[:, None]}
    folded = fold_decoder_norms(params)
    np.testing.assert_allclose(np.linalg.norm(folded["w_dec_FD"], axis=1)[1:], 1.0, rtol=1e-5)
    np.testing.assert_allclose(RELU.reconstruct(folded, x_BD), RELU.reconstruct(params, x_BD), rtol=1e-4, atol=1e-5)
    before, after = (RELU.loss(p, x_BD, x_BD, Moment.plain(40))[1].sparsity for p in (params, folded))
    assert float(after) == pytest.approx(float(before), rel=1e-5)
