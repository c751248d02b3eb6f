"""Products of int8 entries against NumPy, their gradients, and training by them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.mesh import make_mesh
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.matmul import matmul
from saex_pipe.common.sae.nested import decode_nested
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.optimiser import adam
from saex_pipe.common.sae.topk import TopK
from saex_pipe.common.sae.train_step import StepSettings, init_state, make_step

pytest.importorskip("qwix")


def operands() -> tuple[jax.Array, jax.Array]:
    """Rows and columns of very different sizes, a row of zeros among them.

    The largest entry of each is positive: level 127, where the lowest could as well become -127 as -128.
    """
    rng = np.random.default_rng(0)
    a_MN, b_NP = rng.normal(size=(20, 16)), rng.normal(size=(16, 9))
    a_MN *= np.exp(3 * rng.normal(size=(20, 1))) * np.where(a_MN.max(1) > -a_MN.min(1), 1, -1)[:, None]
    b_NP *= np.exp(3 * rng.normal(size=(1, 9))) * np.where(b_NP.max(0) > -b_NP.min(0), 1, -1)[None]
    a_MN[7] = 0
    return jnp.asarray(a_MN, jnp.float32), jnp.asarray(b_NP, jnp.float32)


def test_a_product_is_that_of_rounded_operands_summed_as_integers() -> None:
    a_MN, b_NP = operands()

    def rounded(x: jax.Array, axis: int) -> tuple[np.ndarray, np.ndarray]:
        exact = np.asarray(x, np.float64)
        scale = np.maximum(np.abs(exact).max(axis=axis, keepdims=True), 1e-30) / 127.5
        return np.clip(np.rint(exact / scale), -127, 127), scale

    (a, scale_M), (b, scale_P) = rounded(a_MN, 1), rounded(b_NP, 0)
    product = jax.jit(lambda a_MN, b_NP: matmul(a_MN, b_NP, "int8"))
    found = product(a_MN, b_NP)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, (a @ b) * scale_M * scale_P, rtol=1e-5, atol=1e-6)
    assert np.abs(found - a_MN @ b_NP).max() > 1e-3
    assert "xi32>" in "".join(
        line for line in product.lower(a_MN, b_NP).as_text().splitlines() if "dot_general" in line
    )


def test_gradients_go_straight_through_the_rounding() -> None:
    a_MN, b_NP = operands()
    weights_MP = jnp.asarray(np.random.default_rng(1).normal(size=(20, 9)), jnp.float32)
    found = jax.grad(lambda a, b: jnp.sum(weights_MP * matmul(a, b, "int8")), argnums=(0, 1))(a_MN, b_NP)
    for gradient, expected in zip(found, (weights_MP @ b_NP.T, a_MN.T @ weights_MP), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())


def test_an_sae_learns_by_them(toy_rows: Callable[..., jax.Array]) -> None:
    variant, x_BD, same = TopK(latents=48, k=4), toy_rows(0), Normaliser(jnp.ones(16))
    optimiser = adam(60)
    params = variant.init(jax.random.key(0), DataStats(x_BD.mean(axis=0), x_BD.mean(axis=0)))
    step = jax.jit(make_step(optimiser, StepSettings(total_steps=60, compute=Compute(dtype="int8"))))
    state, fvu = init_state(params, optimiser, Normalisers(same, same)), []
    for _ in range(60):
        state, terms = step(variant, jnp.float32(1e-2), state, x_BD, x_BD)
        fvu.append(float(terms.fvu))
    assert fvu[-1] < 0.6 * fvu[0]


def test_nested_levels_on_a_mesh_are_those_of_float32_but_for_rounding() -> None:
    """Some shards hold nothing of some levels."""
    shapes = (8, 64), (64, 16), (4, 8, 16)
    codes_BF, w_FD, out_GBD = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in enumerate(shapes))

    def both(compute: Compute) -> tuple[jax.Array, ...]:
        def levels(codes_BF: jax.Array, w_FD: jax.Array) -> jax.Array:
            return jnp.stack(decode_nested(codes_BF, w_FD, (8, 16, 20, 64), compute))

        found_GBD, back = jax.vjp(levels, codes_BF, w_FD)
        return found_GBD, *back(out_GBD)

    on_mesh = jax.jit(lambda: both(Compute(dtype="int8", mesh=make_mesh(4))))()
    for found, expected in zip(on_mesh, both(Compute()), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.03 * float(jnp.abs(expected).max()))
