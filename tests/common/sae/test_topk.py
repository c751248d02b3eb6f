"""What only TopK has: dead latents and their auxiliary loss, and the constraint on the decoder."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae.contract import Moment, Params
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.optimiser import adam
from saex_pipe.common.sae.topk import TopK
from saex_pipe.common.sae.train_step import StepSettings, init_state, make_step

TOPK = TopK(latents=48, k=3)
DEAD_AFTER_ROWS = 500


def start_with_dead_latents(rows_BD: jax.Array) -> Params:
    """Half of the latents lie so low that no input reaches them."""
    mean_D = rows_BD.mean(axis=0)
    params = TOPK.init(jax.random.key(0), DataStats(mean_D, mean_D))
    return {**params, "b_enc_F": jnp.where(jnp.arange(TOPK.latents) < TOPK.latents // 2, -3.0, 0.0)}


@pytest.mark.parametrize(("coefficient", "stride", "revives"), [(1 / 32, 1, True), (1 / 32, 8, True), (0.0, 1, False)])
def test_auxiliary_loss_revives_dead_latents(
    coefficient: float, stride: int, revives: bool, toy_rows: Callable[..., jax.Array]
) -> None:
    optimiser = adam(1000)
    variant = replace(TOPK, auxiliary_coefficient=coefficient, auxiliary_stride=stride)
    settings = StepSettings(total_steps=1000, dead_after_rows=DEAD_AFTER_ROWS)
    step = jax.jit(make_step(optimiser, settings), donate_argnums=2)
    batches = [toy_rows(seed, 128) for seed in range(4)]
    state = init_state(
        start_with_dead_latents(batches[0]), optimiser, Normalisers(*(Normaliser(jnp.ones(16)) for _ in range(2)))
    )
    dead = []
    for i in range(300):
        state, terms = step(variant, jnp.float32(1e-2), state, batches[i % 4], batches[i % 4])
        dead.append(float(terms.dead_fraction))
    assert dead[0] == 0.0  # nothing is dead before DEAD_AFTER_ROWS have gone by
    assert max(dead) >= 0.5
    lowest_since = min(dead[dead.index(max(dead)) :])  # on so few rows some die again later
    assert (lowest_since < 0.2) == revives, dead[::50]


def moment(dead_F: jax.Array) -> Moment:
    return Moment.plain(TOPK.latents)._replace(dead_F=dead_F)


value_and_gradients = jax.jit(jax.value_and_grad(TOPK.loss, has_aux=True))


@pytest.mark.parametrize("rows", ["constant", "perfect"])
def test_no_variance_gives_no_nan(rows: str) -> None:
    x_BD = jnp.ones((8, 16)) if rows == "constant" else jnp.zeros((8, 16)).at[:, 0].set(jnp.arange(8.0))
    params = start_with_dead_latents(jnp.zeros((8, 16)))
    if rows == "perfect":  # latent 40 reproduces the rows: the residual has no variance
        unit_D = jnp.zeros(16).at[0].set(1.0)
        params = {
            "w_enc_FD": jnp.zeros((48, 16)).at[40, 0].set(1.0),
            "b_enc_F": jnp.zeros(48),
            "w_dec_FD": params["w_dec_FD"].at[40].set(unit_D),
            "b_dec_D": jnp.zeros(16),
        }
    dead_F = jnp.arange(48) < 24
    (value, _), gradients = value_and_gradients(params, x_BD, x_BD, moment(dead_F))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_a_stride_reads_every_nth_row_for_the_auxiliary_loss(toy_rows: Callable[..., jax.Array]) -> None:
    x_BD = toy_rows(0, 64)
    params = start_with_dead_latents(x_BD)
    dead_F = jnp.arange(48) < 24
    strided = jax.jit(replace(TOPK, auxiliary_stride=4).loss)(params, x_BD, x_BD, moment(dead_F))[1]
    loss = jax.jit(TOPK.loss)
    subset, every = loss(params, x_BD[::4], x_BD[::4], moment(dead_F))[1], loss(params, x_BD, x_BD, moment(dead_F))[1]
    assert float(strided.auxiliary) == pytest.approx(float(subset.auxiliary), rel=1e-6)
    assert float(strided.auxiliary) != pytest.approx(float(every.auxiliary), rel=1e-3)
    assert float(strided.reconstruction) == float(every.reconstruction)


def test_decoder_gradient_has_no_part_along_its_rows(toy_rows: Callable[..., jax.Array]) -> None:
    x_BD = toy_rows(0)
    params = start_with_dead_latents(x_BD)
    _, gradients = value_and_gradients(params, x_BD, x_BD, moment(jnp.zeros(48, bool)))
    projected_FD = np.asarray(TOPK.project_gradients(params, gradients)["w_dec_FD"], np.float64)
    w_dec_FD, gradient_FD = np.asarray(params["w_dec_FD"]), np.asarray(gradients["w_dec_FD"], np.float64)
    along_F = (gradient_FD * w_dec_FD).sum(axis=1)
    assert np.abs(along_F).max() > 1e-3
    np.testing.assert_allclose((projected_FD * w_dec_FD).sum(axis=1), 0.0, atol=1e-7)
    np.testing.assert_allclose(projected_FD + along_F[:, None] * w_dec_FD, gradient_FD, atol=1e-7)


def test_a_stack_runs_the_auxiliary_loss_at_one_size_for_all(toy_rows: Callable[..., jax.Array]) -> None:
    """A switch stays one: under vmap it would become a selection among all of its branches, each computed."""
    x_BD = toy_rows(0, 64)
    singles = [start_with_dead_latents(x_BD), start_with_dead_latents(x_BD + 1)]
    dead_SF = jnp.stack([jnp.arange(48) < n for n in (0, 24)])

    def auxiliary(params: Params, dead_F: jax.Array) -> jax.Array:
        return TOPK.loss(params, x_BD, x_BD, moment(dead_F))[1].auxiliary

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    program = str(jax.make_jaxpr(jax.vmap(jax.grad(auxiliary)))(stacked, dead_SF))
    assert "branches=" in program
    found_S = jax.jit(jax.vmap(auxiliary))(stacked, dead_SF)
    expected = [float(jax.jit(auxiliary)(params, dead_F)) for params, dead_F in zip(singles, dead_SF, strict=True)]
    np.testing.assert_allclose(found_S, expected, rtol=1e-5)
    assert expected[0] == 0 < expected[1]
