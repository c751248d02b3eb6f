"""8-bit Adam: its memory, how close it stays to Adam, and the trap of second moments that are rounded to 0."""

import jax
import jax.numpy as jnp
import numpy as np

from saex_pipe.common.sae.adam_8bit import Adam8BitState, Levels
from saex_pipe.common.sae.optimiser import Optimiser
from saex_pipe.common.sae.schedules import RateSchedule

FLAT = RateSchedule(warmup=0, decay=0)
OURS = Optimiser(name="adam_8bit", clip_norm=None, schedule=FLAT).build(10**6)
ADAM = Optimiser(clip_norm=None, schedule=FLAT).build(10**6)
ROWS, WIDTH = 64, 32
STEP = jax.jit(OURS.update)


def test_matrices_take_two_bytes_a_parameter() -> None:
    params = {"w_enc_FD": jnp.zeros((ROWS, WIDTH)), "w_dec_FD": jnp.zeros((ROWS, WIDTH)), "b_enc_F": jnp.zeros(ROWS)}
    state = OURS.init(params)
    assert state.mean["w_enc_FD"].level.dtype == jnp.int8
    assert state.root["w_enc_FD"].level.dtype == jnp.uint8
    assert state.mean["w_enc_FD"].scale.shape == (ROWS, 1)
    assert state.root["w_dec_FD"].scale.shape == (ROWS, 1)
    assert state.root["b_enc_F"].dtype == jnp.float32
    assert sum(leaf.nbytes for leaf in jax.tree.leaves((state.mean, state.root))) == 2 * (
        2 * ROWS * WIDTH + 4 * 2 * ROWS + 4 * ROWS
    )


def test_a_moment_is_rounded_to_a_level_beside_it_and_right_on_average() -> None:
    """After one step from 0 the moments are 0.1 g and sqrt(0.001) |g|."""
    row_D = np.random.default_rng(0).normal(size=WIDTH).astype(np.float32)
    gradient = {"w_dec_FD": jnp.asarray(np.tile(row_D, (4000, 1)))}
    _, state = STEP(gradient, OURS.init(gradient))
    for moment, exact_D in ((state.mean, 0.1 * row_D), (state.root, np.sqrt(0.001) * np.abs(row_D))):
        levels: Levels = moment["w_dec_FD"]
        step = np.asarray(levels.scale[0, 0])
        error_FD = np.asarray(levels.value()) - exact_D
        assert np.abs(error_FD).max() < step * (1 + 1e-4)
        # A level is off by at most half a standard deviation's worth: 1/2 / sqrt(4000), of which this is four.
        assert np.abs(error_FD.mean(axis=0)).max() < 4 * 0.5 * step / np.sqrt(4000)
        assert np.abs(error_FD[:, row_D != row_D[np.abs(row_D).argmax()]]).max() > 0.5 * step


def test_updates_stay_close_to_those_of_adam() -> None:
    rng = np.random.default_rng(1)
    spread = np.exp(0.5 * rng.normal(size=(ROWS, WIDTH)))  # the scales of entries of a row differ
    state, exact = OURS.init({"w_dec_FD": jnp.zeros((ROWS, WIDTH))}), ADAM.init({"w_dec_FD": jnp.zeros((ROWS, WIDTH))})
    adam_step = jax.jit(ADAM.update)
    errors = []
    for _ in range(300):
        gradient = {"w_dec_FD": jnp.asarray(spread * (0.3 + rng.normal(size=(ROWS, WIDTH))), jnp.float32)}
        found, state = STEP(gradient, state)
        expected, exact = adam_step(gradient, exact)
        size = np.square(expected["w_dec_FD"]).mean()
        errors.append(float(np.square(found["w_dec_FD"] - expected["w_dec_FD"]).mean() / size))
    assert errors[0] < 1e-10  # nothing was rounded yet
    assert max(errors) < 0.02


def test_a_second_moment_falls_as_far_as_that_of_adam() -> None:
    """Rounded to the nearest level it would not: sqrt(0.999) of a level is nearer to it than to the next."""
    first = {"w_dec_FD": jnp.ones((ROWS, WIDTH))}
    later = {"w_dec_FD": jnp.zeros((ROWS, WIDTH)).at[:, 0].set(1.0)}  # column 0 keeps the scale where it is
    _, state = STEP(first, OURS.init(first))
    for _ in range(1000):
        _, state = STEP(later, state)
    root_FD = np.asarray(state.root["w_dec_FD"].value())[:, 1:]
    assert abs(root_FD.mean() / np.sqrt(0.001 * 0.999**1000) - 1) < 0.05


def test_an_entry_whose_second_moment_is_rounded_to_nothing_does_not_blow_up() -> None:
    """Entries of a row 10,000 times smaller than its largest, which then see no gradient for a while."""
    row_D = np.where(np.arange(WIDTH) == 0, 1.0, 1e-4).astype(np.float32)
    gradient = {"w_dec_FD": jnp.asarray(np.tile(row_D, (ROWS, 1)))}
    state: Adam8BitState = OURS.init(gradient)
    for _ in range(50):
        found, state = STEP(gradient, state)
        silent, _ = STEP(jax.tree.map(jnp.zeros_like, gradient), state)
        for update in (found, silent):
            assert np.abs(update["w_dec_FD"]).max() < 4  # a level of m over one of sqrt(v)
    assert (np.asarray(state.root["w_dec_FD"].level)[:, 1:] == 0).any()
