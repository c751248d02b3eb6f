"""Every penalty and its gradient in closed form, in float64, and what happens at 0."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae.penalties import DEFAULT_SCALES, Penalty, mean_penalty, reciprocal_factor

ROWS, LATENTS = 7, 12
HALF, END = jnp.float32(0.15), jnp.float32(1.0)  # of the training; at HALF eps is twice its last value


def row_sum(u_BF: np.ndarray) -> np.ndarray:
    return u_BF.sum(axis=1, keepdims=True)


def hoyer_gradient(u_BF: np.ndarray) -> np.ndarray:
    total_B1, square_B1 = row_sum(u_BF), row_sum(u_BF**2)
    return 2 * total_B1 / square_B1 - 2 * total_B1**2 * u_BF / square_B1**2


# Of weighted codes u: the penalty of each row and its derivative by u.
CLOSED: dict[str, tuple[Penalty, float | None, Callable, Callable]] = {
    "l1": ("l1", None, lambda u: u.sum(axis=1), np.ones_like),
    "sqrt_l1": ("sqrt_l1", None, lambda u: np.sqrt(u).sum(axis=1), lambda u: 0.5 / np.sqrt(u)),
    "tanh": ("tanh", 2.5, lambda u: np.tanh(2.5 * u).sum(axis=1), lambda u: 2.5 / np.cosh(2.5 * u) ** 2),
    "hoyer": ("hoyer", None, lambda u: u.sum(axis=1) ** 2 / (u**2).sum(axis=1), hoyer_gradient),
    "reciprocal": ("reciprocal", 0.3, lambda u: (u / (u + 0.6)).sum(axis=1), lambda u: 0.6 / (u + 0.6) ** 2),
    "l0": ("l0", 1.6, lambda u: (u > 0).sum(axis=1), lambda u: (u < 0.8) / 1.6),
    "tanh by default": ("tanh", None, lambda u: np.tanh(4 * u).sum(axis=1), lambda u: 4 / np.cosh(4 * u) ** 2),
}
loss_and_gradients = jax.jit(jax.value_and_grad(mean_penalty, argnums=(1, 2)), static_argnums=0)
gradient_of_codes = jax.jit(jax.grad(mean_penalty, argnums=1), static_argnums=0)


@pytest.mark.parametrize("case", CLOSED)
def test_values_and_gradients_equal_the_equations(case: str) -> None:
    kind, scale, penalty, derivative = CLOSED[case]
    rng = np.random.default_rng(0)
    codes_BF = rng.uniform(0.01, 2, (ROWS, LATENTS))
    norms_F = rng.uniform(0.5, 1.5, LATENTS)
    args = jnp.asarray(codes_BF, jnp.float32), jnp.asarray(norms_F, jnp.float32), scale, HALF
    weighted_BF = codes_BF * norms_F
    value, (by_codes_BF, by_norms_F) = loss_and_gradients(kind, *args)
    assert float(value) == pytest.approx(penalty(weighted_BF).mean(), rel=1e-6)
    slope_BF = derivative(weighted_BF) / ROWS
    np.testing.assert_allclose(by_codes_BF, slope_BF * norms_F, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_norms_F, (slope_BF * codes_BF).sum(axis=0), rtol=1e-4, atol=1e-6)
    unweighted = mean_penalty(kind, args[0], None, scale, HALF)
    assert float(unweighted) == pytest.approx(penalty(codes_BF).mean(), rel=1e-6)


@pytest.mark.parametrize("kind", ["l1", "sqrt_l1", "tanh", "hoyer", "reciprocal", "l0"])
@pytest.mark.parametrize("code", [0.0, 1e-38, 1e-20, 1e-7])
def test_codes_at_and_near_0_give_finite_gradients(kind: Penalty, code: float) -> None:
    codes_BF = jnp.full((ROWS, LATENTS), code, jnp.float32).at[1, 2].set(1.0)
    gradient_BF = np.asarray(gradient_of_codes(kind, codes_BF, None, None, END), np.float64)
    assert np.isfinite(gradient_BF).all()
    assert np.abs(gradient_BF).max() < 1e6


@pytest.mark.parametrize("kind", ["l1", "sqrt_l1", "tanh", "hoyer", "reciprocal", "l0"])
def test_rows_without_codes_cost_nothing(kind: Penalty) -> None:
    assert float(mean_penalty(kind, jnp.zeros((ROWS, LATENTS)), None, None, END)) == 0.0


def test_l0_sees_a_latent_only_while_it_is_active() -> None:
    z_BF = jnp.asarray([[-0.01, 0.0, 0.01, 0.04, 0.06, 3.0]], jnp.float32)

    def loss(z_BF: jax.Array) -> jax.Array:
        return mean_penalty("l0", jax.nn.relu(z_BF), None, None, END)

    value, gradient_BF = jax.value_and_grad(loss)(z_BF)
    assert float(value) == 4.0
    steep = 1 / DEFAULT_SCALES["l0"]
    np.testing.assert_allclose(gradient_BF, [[0, 0, steep, steep, 0, 0]], rtol=1e-6)


def test_epsilon_falls_in_steps() -> None:
    factors = [float(reciprocal_factor(jnp.float32(done))) for done in (0, 0.0999, 0.1001, 0.1999, 0.2001, 1)]
    assert factors == [4, 4, 2, 2, 1, 1]
