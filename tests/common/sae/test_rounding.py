"""Stochastic rounding: its neighbours, its mean, and that weights kept in bfloat16 learn by it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae import rounding
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.optimiser import Optimiser
from saex_pipe.common.sae.relu import Relu
from saex_pipe.common.sae.schedules import RateSchedule
from saex_pipe.common.sae.train_step import StepSettings, TrainState, init_state, make_step

DRAWS = 20_000


def test_a_number_goes_to_either_neighbour_and_is_right_on_average() -> None:
    x_N = np.array([1.001, -1.001, 3.3e-5, -777.7, 1.0078124], np.float32)
    found_RN = np.asarray(
        rounding.round_stochastically(jnp.tile(x_N, (DRAWS, 1)), jax.random.key(3)).astype(jnp.float32)
    )
    lower_N = (np.abs(x_N).view(np.uint32) & 0xFFFF0000).view(np.float32)
    upper_N = ((np.abs(x_N).view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)
    assert (np.isin(np.abs(found_RN), [lower_N, upper_N])).all()
    gap_N = upper_N - lower_N
    # The mean of n draws from two neighbours is off by at most half the gap over sqrt(n): five of these.
    error_N = np.abs(found_RN.astype(np.float64).mean(axis=0) - x_N)
    assert (error_N < 5 * 0.5 * gap_N / np.sqrt(DRAWS)).all()
    assert (error_N[:4] < 0.1 * np.minimum(np.abs(x_N) - lower_N, upper_N - np.abs(x_N))[:4]).all()


def test_what_bfloat16_can_represent_stays() -> None:
    x_N = np.array([0.0, -0.0, 1.0, -0.5, 3.140625, 2.0**-126, -(2.0**100), np.inf, -np.inf], np.float32)
    for seed in range(5):
        found_N = rounding.round_stochastically(jnp.asarray(x_N), jax.random.key(seed)).astype(jnp.float32)
        np.testing.assert_array_equal(np.asarray(found_N).view(np.uint32), x_N.view(np.uint32))


@pytest.fixture
def trained(toy_rows: Callable[..., jax.Array]) -> Callable[[str], tuple[TrainState, list[float]]]:
    """Trains with updates far below half a step of a weight in bfloat16: 1e-4 where weights are about 0.25."""
    variant = Relu(latents=48, sparsity_coefficient=0.0)
    optimiser = Optimiser(schedule=RateSchedule(warmup=0, decay=0)).build(250)
    x_BD, same = toy_rows(0), Normaliser(jnp.ones(16))

    def train(dtype: Any) -> tuple[TrainState, list[float]]:
        params = variant.init(jax.random.key(0), DataStats(x_BD.mean(axis=0), x_BD.mean(axis=0)))
        params["w_enc_FD"] = 10 * params["w_enc_FD"]  # as large as decoder rows of length 1
        state = init_state(params, optimiser, Normalisers(same, same), weight_dtype=dtype)
        step = jax.jit(make_step(optimiser, StepSettings(total_steps=250, weight_dtype=dtype)))
        errors = []
        for _ in range(250):
            state = state._replace(params={**state.params, "b_enc_F": params["b_enc_F"], "b_dec_D": params["b_dec_D"]})
            state, terms = step(variant, jnp.float32(1e-4), state, x_BD, x_BD)
            errors.append(float(terms.fvu))
        return state, errors

    return train


def test_weights_in_bfloat16_learn_where_rounding_to_the_nearest_stalls(
    trained: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, exact = trained("float32")
    state, stochastic = trained("bfloat16")
    types = {name: leaf.dtype for name, leaf in state.params.items()}
    assert {name for name, dtype in types.items() if dtype == jnp.bfloat16} == {"w_enc_FD", "w_dec_FD"}
    assert types["b_enc_F"] == jnp.float32
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(state.opt_state))
    monkeypatch.setattr(rounding, "round_stochastically", lambda x, key: x.astype(jnp.bfloat16))
    _, nearest = trained("bfloat16")
    gain = exact[0] - exact[-1]
    assert gain > 0.01
    assert stochastic[0] - stochastic[-1] > 0.8 * gain
    assert nearest[0] - nearest[-1] < 0.5 * gain
