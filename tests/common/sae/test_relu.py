"""What only the ReLU variant has: the warm-up of its penalty and the folding of decoder norms."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae.contract import DataStats
from saex_pipe.common.sae.folding import fold_decoder_norms
from saex_pipe.common.sae.optimiser import adam
from saex_pipe.common.sae.relu import Relu
from saex_pipe.common.sae.train_step import init_state, make_step

RELU = Relu(latents=40, sparsity_coefficient=2.0)


def test_penalty_rises_linearly_over_the_warmup(toy_rows: Callable[..., jax.Array]) -> None:
    x_BD = toy_rows(0)
    params = RELU.init(jax.random.key(0), DataStats(x_BD.mean(axis=0), x_BD.mean(axis=0)))
    optimiser = adam(0.0, 10)  # nothing moves, so that only the warm-up changes the penalty
    step = jax.jit(make_step(RELU, optimiser, 10**6, sparsity_warmup_steps=4))
    state, penalties = init_state(params, optimiser), []
    for _ in range(6):
        state, terms = step(state, x_BD, x_BD)
        penalties.append(float(terms.sparsity))
        assert float(terms.total) == pytest.approx(float(terms.reconstruction + terms.sparsity))
    full = float(RELU.loss(params, x_BD, x_BD, jnp.zeros(40, bool))[1].sparsity)
    np.testing.assert_allclose(penalties, full * np.array([0, 0.25, 0.5, 0.75, 1, 1]), rtol=1e-5)


def test_folding_decoder_norms_keeps_reconstructions_and_the_penalty(toy_rows: Callable[..., jax.Array]) -> None:
    x_BD = toy_rows(0)
    params = RELU.init(jax.random.key(0), DataStats(x_BD.mean(axis=0), x_BD.mean(axis=0)))
    lengths_F = jnp.linspace(0.0, 3.0, 40)  # one row is 0: it must stay so, without NaN
    params = {**params, "w_dec_FD": params["w_dec_FD"] * lengths_F[:, None]}
    folded = fold_decoder_norms(params)
    np.testing.assert_allclose(np.linalg.norm(folded["w_dec_FD"], axis=1)[1:], 1.0, rtol=1e-5)
    np.testing.assert_allclose(RELU.reconstruct(folded, x_BD), RELU.reconstruct(params, x_BD), rtol=1e-4, atol=1e-5)
    before, after = (RELU.loss(p, x_BD, x_BD, jnp.zeros(40, bool))[1].sparsity for p in (params, folded))
    assert float(after) == pytest.approx(float(before), rel=1e-5)
