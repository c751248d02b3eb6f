"""Every optimiser against its equations in float64 or optax's chain, alone and as a stack, donated, and saved."""

from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saex_pipe.common.formats.checkpoint import TrainingState
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.sae.optimiser import ADAM_EPSILON, Optimiser, OptimiserName, adam
from saex_pipe.common.sae.schedules import RateSchedule

SHAPES = {"w_enc_FD": (10, 6), "w_dec_FD": (10, 6), "b_enc_F": (10,), "b_dec_D": (6,)}
FLAT = RateSchedule(warmup=0, decay=0)  # updates as they are for a learning rate of 1
STEPS = 6
every_optimiser = pytest.mark.parametrize("name", get_args(OptimiserName))

Arrays = dict[str, np.ndarray]


def gradients(steps: int = STEPS, seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[Arrays]:
    rng = np.random.default_rng(seed)
    return [{key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()} for _ in range(steps)]


def updates(optimiser: optax.GradientTransformation, given: list[Arrays]) -> list[Arrays]:
    params = jax.tree.map(jnp.ones_like, jax.tree.map(jnp.asarray, given[0]))
    state, found = optimiser.init(params), []
    step = jax.jit(optimiser.update)
    with jax.numpy_dtype_promotion("standard"):
        for each in given:
            update, state = step(each, state, params)
            found.append(jax.tree.map(np.asarray, update))
    return found


def assert_follows(found: list[Arrays], expected: list[Arrays], rtol: float = 2e-5) -> None:
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for key, value in theirs.items():
            np.testing.assert_allclose(ours[key], value, rtol=rtol, atol=1e-6, err_msg=f"{key} at step {step}")


@pytest.mark.parametrize("momentum", [0.9, 0.0], ids=["momentum", "momentum-free"])
@pytest.mark.parametrize("scale", [1e-3, 10.0], ids=["unclipped", "clipped"])
def test_adam_equals_the_chain_of_optax(scale: float, momentum: float) -> None:
    schedule = RateSchedule(warmup=3, decay=0.5)
    given = [jax.tree.map(lambda g: scale * g, each) for each in gradients(20)]
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=momentum, b2=0.99, eps=ADAM_EPSILON),
        optax.scale_by_learning_rate(lambda step: schedule.factor(20, step)),
    )
    ours = Optimiser(momentum=momentum, beta_square=0.99, schedule=schedule)
    assert_follows(updates(ours.build(20), given), updates(chain, given))


def test_the_default_is_clipped_adam_with_the_default_schedule() -> None:
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(lambda step: RateSchedule().factor(STEPS, step), eps=ADAM_EPSILON),
    )
    assert_follows(updates(adam(STEPS), gradients()), updates(chain, gradients()))


def test_momentum_free_adam_keeps_no_first_moment() -> None:
    params = {key: jnp.zeros(shape) for key, shape in SHAPES.items()}
    size = sum(leaf.size for leaf in params.values())
    kept = {m: Optimiser(momentum=m).build(1).init(params) for m in (0.0, 0.9)}
    assert {m: sum(leaf.size for leaf in jax.tree.leaves(state)) - 1 for m, state in kept.items()} == {
        0.0: size,
        0.9: 2 * size,
    }


@pytest.mark.parametrize("limit", [None, 0.5])
def test_the_threshold_of_clipping(limit: float | None) -> None:
    """A sign does not see it, Adam's first update without epsilon neither: with a large one it is -g / epsilon."""
    given = gradients(1)
    (found,) = updates(Optimiser(clip_norm=limit, epsilon=1e6, schedule=FLAT).build(1), given)
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in given[0].values()))
    assert norm > 1
    for key, gradient in given[0].items():
        np.testing.assert_allclose(found[key], -gradient * min(1, (limit or norm) / norm) / 1e6, rtol=1e-4)


def adafactor_reference(given: list[Arrays]) -> Iterator[Arrays]:
    """Shazeer and Stern 2018, algorithms 4 and 5 with d = 1, without the factor of the parameter's size."""
    square: dict[str, Any] = {}
    for step, each in enumerate(given, start=1):
        found, beta = {}, 1 - step**-0.8
        for key, g in each.items():
            g2 = g.astype(np.float64) ** 2 + 1e-30
            if g.ndim == 2:
                rows, columns = square.get(key, (0, 0))
                rows, columns = beta * rows + (1 - beta) * g2.mean(1), beta * columns + (1 - beta) * g2.mean(0)
                square[key] = rows, columns
                v = np.outer(rows, columns) / rows.mean()
            else:
                v = square[key] = beta * square.get(key, 0) + (1 - beta) * g2
            u = g / np.sqrt(v)
            found[key] = -u / max(1, np.sqrt((u**2).mean()))
        yield found


def test_adafactor_equals_its_equations() -> None:
    shapes = {"w_enc_FD": (130, 128), "b_enc_F": (130,)}
    given = gradients(4, shapes=shapes)
    found = updates(Optimiser(name="adafactor", clip_norm=None, schedule=FLAT).build(4), given)
    assert_follows(found, list(adafactor_reference(given)), rtol=1e-4)


def muon_reference(given: list[Arrays], beta: float = 0.95) -> Iterator[Arrays]:
    """Jordan 2024: Nesterov momentum, five Newton-Schulz steps; the factor of Liu et al. 2025. Matrices only.

    optax corrects the bias of both terms of the momentum.
    """
    mean: dict[str, Any] = {}
    for step, each in enumerate(given, start=1):
        found = {}
        for key in ("w_enc_FD", "w_dec_FD"):
            g = each[key].astype(np.float64)
            mean[key] = beta * mean.get(key, 0) + (1 - beta) * g
            x = beta * mean[key] / (1 - beta ** (step + 1)) + (1 - beta) * g / (1 - beta**step)
            x = x / np.linalg.norm(x)
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            found[key] = -0.2 * np.sqrt(max(x.shape)) * x
        yield found


def test_muon_equals_its_equations_for_matrices_and_is_adam_for_the_rest() -> None:
    found = updates(Optimiser(name="muon", clip_norm=None, schedule=FLAT).build(STEPS), gradients())
    assert_follows(found, list(muon_reference(gradients())), rtol=1e-3)
    vectors = [{key: each[key] for key in ("b_enc_F", "b_dec_D")} for each in gradients()]
    assert_follows(found, updates(optax.nadam(1.0), vectors))


def test_signum_is_the_sign_of_the_momentum() -> None:
    found = updates(Optimiser(name="signum", momentum=0.5, clip_norm=None, schedule=FLAT).build(STEPS), gradients())
    mean = jax.tree.map(np.zeros_like, gradients()[0])
    for ours, each in zip(found, gradients(), strict=True):
        mean = jax.tree.map(lambda m, g: 0.5 * m + 0.5 * g, mean, each)
        jax.tree.map(lambda u, m: np.testing.assert_array_equal(u, -np.sign(m)), ours, mean)


@every_optimiser
def test_a_stack_learns_as_each_of_it_and_reuses_its_memory(name: OptimiserName) -> None:
    optimiser = Optimiser(name=name).build(10)
    given = [gradients(2, seed) for seed in range(3)]
    alone = [updates(optimiser, each)[-1] for each in given]

    def stack(*leaves: Any) -> jax.Array:
        return jnp.stack(leaves)

    params = jax.tree.map(stack, *([{key: jnp.ones(shape) for key, shape in SHAPES.items()}] * 3))
    state = jax.vmap(optimiser.init)(params)
    stacks = [jax.tree.map(stack, *each) for each in zip(*given, strict=True)]
    with jax.numpy_dtype_promotion("standard"):
        step = jax.jit(jax.vmap(optimiser.update), donate_argnums=1).lower(stacks[0], state, params).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert step.memory_analysis().alias_size_in_bytes > 0.9 * size  # all but the odd constant
    for each in stacks:
        found, state = step(each, state, params)
    for number, expected in enumerate(alone):
        for key, value in expected.items():
            np.testing.assert_allclose(found[key][number], value, rtol=1e-4, atol=1e-5)


@every_optimiser
def test_a_saved_state_comes_back_as_it_was(name: OptimiserName, tmp_path: Any) -> None:
    optimiser = Optimiser(name=name).build(10)
    params = {key: jnp.ones(shape) for key, shape in SHAPES.items()}
    fresh = optimiser.init(params)
    with jax.numpy_dtype_promotion("standard"):
        _, state = jax.jit(optimiser.update)(gradients(1)[0], fresh, params)
    with TrainingState(Folder(str(tmp_path))) as saves:
        saves.save(1, {"optimiser": state})
        saves.wait()
        found = saves.restore(1, {"optimiser": fresh})["optimiser"]
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert any(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (state, fresh)), strict=True)
    )
