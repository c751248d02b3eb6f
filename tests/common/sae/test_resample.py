"""Resampling of dead latents: what is drawn, where latents start again, and that nothing else changes."""

from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae.compute import PLAIN
from saex_pipe.common.sae.contract import Variant, has_latents
from saex_pipe.common.sae.initial import DataStats, Initial
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.optimiser import Optimiser, OptimiserName
from saex_pipe.common.sae.relu import Relu
from saex_pipe.common.sae.resample import Drawn, draw, nothing_drawn, revive
from saex_pipe.common.sae.topk import TopK
from saex_pipe.common.sae.train_step import TrainState, init_state

WIDTH, LATENTS, DEAD_AFTER = 16, 24, 100
DEAD = [3, 4, 11]
VARIANTS = [
    Relu(latents=LATENTS, sparsity_coefficient=1.0, initial=Initial(encoder_bias="firing_share")),
    TopK(latents=LATENTS, k=4),
]
both_centres = pytest.mark.parametrize("variant", VARIANTS, ids=["centre of the data", "decoder bias"])


def start(
    variant: Variant, x_BD: jax.Array, name: OptimiserName = "adam", scale: float = 1.0, averaged: bool = False
) -> tuple[TrainState, DataStats]:
    """A state in which three latents are dead."""
    normaliser = Normaliser(jnp.full(WIDTH, scale))
    stats = DataStats(scale * x_BD.mean(axis=0), scale * x_BD.mean(axis=0))
    params = variant.init(jax.random.key(0), stats._replace(input_rows_ND=scale * x_BD, target_rows_ND=scale * x_BD))
    dead_F = jnp.isin(jnp.arange(LATENTS), jnp.array(DEAD))
    params["b_enc_F"] = jnp.where(dead_F, -100.0, params["b_enc_F"])
    params["w_enc_FD"] = jnp.where(dead_F[:, None], 7.0, 1.0) * params["w_enc_FD"]
    state = init_state(params, Optimiser(name=name).build(10), Normalisers(normaliser, normaliser), averaged=averaged)
    return state._replace(rows_since_fired_F=jnp.where(dead_F, DEAD_AFTER, DEAD_AFTER - 1)), stats


def test_rows_are_drawn_by_their_squared_loss_and_none_twice(toy_rows: Callable[..., jax.Array]) -> None:
    """Four rows, of which the SAE reconstructs nothing: errors are their square norms, here 1, 2, 3 and 0."""
    variant = Relu(latents=3, sparsity_coefficient=0.0)
    params = {
        "w_enc_FD": jnp.zeros((3, 4)),
        "b_enc_F": jnp.zeros(3),
        "w_dec_FD": jnp.ones((3, 4)),
        "b_dec_D": jnp.zeros(4),
    }
    same = Normaliser(jnp.ones(4))
    state = init_state(params, Optimiser().build(1), Normalisers(same, same))
    x_BD = jnp.diag(jnp.sqrt(jnp.array([1.0, 2.0, 3.0, 0.0])))

    def both_batches(key: jax.Array) -> Drawn:
        drawn = nothing_drawn(params)
        for number, rows_BD in enumerate((x_BD[:1], x_BD[1:])):
            drawn = draw(variant, state, drawn, jax.random.fold_in(key, number), rows_BD, rows_BD)
        return drawn

    drawn = jax.jit(jax.vmap(both_batches))(jax.random.split(jax.random.key(1), 4000))
    which_NF = np.argmax(drawn.x_FD, axis=2)
    assert np.array_equal(np.sort(which_NF, axis=1), np.tile([0, 1, 2], (4000, 1)))
    np.testing.assert_array_equal(drawn.target_FD, drawn.x_FD)
    weights = np.array([1.0, 4.0, 9.0]) / 14
    first = np.bincount(which_NF[:, 0], minlength=3) / 4000
    np.testing.assert_allclose(first, weights, atol=5 * 0.5 / np.sqrt(4000))
    second_of_third = np.bincount(which_NF[which_NF[:, 0] == 2, 1], minlength=3)  # among rows 0 and 1: 1 to 4
    np.testing.assert_allclose(second_of_third[0] / second_of_third.sum(), 0.2, atol=5 * 0.4 / np.sqrt(4000 * 9 / 14))


def test_places_without_a_row_revive_nothing(toy_rows: Callable[..., jax.Array]) -> None:
    x_BD = toy_rows(0)
    variant = VARIANTS[0]
    state, _ = start(variant, x_BD)
    drawn = draw(variant, state, nothing_drawn(state.params), jax.random.key(0), x_BD[:2], x_BD[:2])
    after = revive(variant, state, drawn, jax.random.key(1), DEAD_AFTER)
    assert [int(n) for n in np.flatnonzero(after.rows_since_fired_F == 0)] == DEAD[:2]
    np.testing.assert_array_equal(after.params["w_dec_FD"][DEAD[2]], state.params["w_dec_FD"][DEAD[2]])


@both_centres
def test_where_latents_start_again_and_that_they_fire(variant: Variant, toy_rows: Callable[..., jax.Array]) -> None:
    scale = 2.0
    x_BD = toy_rows(0)
    state, stats = start(variant, x_BD, scale=scale, averaged=True)
    drawn = nothing_drawn(state.params)
    for number, half_BD in enumerate((x_BD[:48], x_BD[48:])):
        drawn = draw(variant, state, drawn, jax.random.key(number), half_BD, half_BD)
    assert all(np.isclose(scale * x_BD, row_D, atol=1e-5).all(axis=1).any() for row_D in drawn.x_FD)
    after = revive(variant, state, drawn, jax.random.key(1), DEAD_AFTER)
    before = {name: np.asarray(leaf, np.float64) for name, leaf in state.params.items()}
    alive = np.setdiff1d(np.arange(LATENTS), DEAD)
    length = np.linalg.norm(before["w_enc_FD"], axis=1)[alive].mean()
    centre_D = before["b_dec_D"] if variant.subtracts_decoder_bias else np.asarray(stats.input_mean_D, np.float64)
    for place, latent in enumerate(DEAD):
        row_D = np.asarray(drawn.x_FD[place], np.float64)
        encoder_D = 0.2 * length * (row_D - centre_D) / np.linalg.norm(row_D - centre_D)
        decoder_D = (row_D - before["b_dec_D"]) / np.linalg.norm(row_D - before["b_dec_D"])
        decoder_D *= np.linalg.norm(before["w_dec_FD"][alive], axis=1).mean()
        bias = 0 if variant.subtracts_decoder_bias else -centre_D @ encoder_D
        for params in (after.params, after.averages):
            np.testing.assert_allclose(params["w_enc_FD"][latent], encoder_D, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(params["w_dec_FD"][latent], decoder_D, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(params["b_enc_F"][latent], bias, rtol=1e-4, atol=1e-6)
    for name, leaf in after.params.items():
        rows = np.array(alive) if has_latents(name) else slice(None)
        kept, was = (np.asarray(part)[rows] for part in (leaf, state.params[name]))
        np.testing.assert_array_equal(kept, was)
    np.testing.assert_array_equal(after.rows_since_fired_F[np.array(DEAD)], 0)
    for place, latent in enumerate(DEAD):
        assert variant.pre_activations(after.params, drawn.x_FD[place][None], PLAIN)[0, latent] > 0


@pytest.mark.parametrize("name", get_args(OptimiserName))
def test_the_optimiser_forgets_those_latents_and_no_others(name: OptimiserName, toy_rows: Callable) -> None:
    variant, x_BD = VARIANTS[0], toy_rows(0)
    state, stats = start(variant, x_BD, name)
    state = state._replace(opt_state=jax.tree.map(lambda leaf: jnp.full_like(leaf, 3), state.opt_state))
    drawn = Drawn(jnp.zeros(LATENTS), x_BD[:LATENTS], x_BD[:LATENTS], stats, jnp.ones(()))
    after = revive(variant, state, drawn, jax.random.key(1), DEAD_AFTER)
    found = {"latents": 0, "other": 0}
    for leaf in map(np.asarray, jax.tree.leaves(after.opt_state)):
        axes = [axis for axis, size in enumerate(leaf.shape) if size == LATENTS]
        found["latents" if axes else "other"] += 1
        expected = np.full(leaf.shape, 3)
        if axes:
            np.moveaxis(expected, axes[0], 0)[DEAD] = 0
        np.testing.assert_array_equal(leaf, expected)
    assert found["latents"] >= 3
    assert found["other"] >= 1


def test_a_stack_is_resampled_as_each_of_it(toy_rows: Callable[..., jax.Array]) -> None:
    variant, x_BD = VARIANTS[1], toy_rows(0)
    pair = [start(variant, x_BD, scale=scale) for scale in (1.0, 2.0)]
    key = jax.random.key(5)

    def resample(variant: Variant, state: TrainState, stats: DataStats) -> TrainState:
        drawn = draw(variant, state, nothing_drawn(state.params), key, x_BD, x_BD)
        return revive(variant, state, drawn, key, DEAD_AFTER)

    def stack(*leaves: Any) -> jax.Array:
        return jnp.stack([jnp.asarray(leaf, jnp.result_type(leaf)) for leaf in leaves])

    states, stats_S = (jax.tree.map(stack, *side) for side in zip(*pair, strict=True))
    both = jax.jit(jax.vmap(resample, in_axes=(None, 0, 0)))(variant, states, stats_S)
    for number, (state, stats) in enumerate(pair):
        alone = jax.jit(resample)(variant, state, stats)
        for name, leaf in alone.params.items():
            np.testing.assert_allclose(both.params[name][number], leaf, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(both.rows_since_fired_F[number], alone.rows_since_fired_F)
