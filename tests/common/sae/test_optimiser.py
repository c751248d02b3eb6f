"""The default optimiser against optax's chain, and the shape of its schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saex_pipe.common.sae.optimiser import ADAM_EPSILON, adam, learning_rate


@pytest.mark.parametrize("scale", [1e-3, 10.0], ids=["unclipped", "clipped"])
def test_adam_equals_the_chain_of_optax(scale: float) -> None:
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), "b": jnp.zeros(3)}
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=ADAM_EPSILON),
        optax.scale_by_learning_rate(lambda step: learning_rate(1e-2, 20, step)),
    )
    ours = adam(20, 1e-2)
    state, chain_state = ours.init(params), chain.init(params)
    for _ in range(20):
        gradients = jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), jnp.float32), params)
        updates, state = ours.update(gradients, state, params)
        with jax.numpy_dtype_promotion("standard"):
            expected, chain_state = chain.update(gradients, chain_state, params)
        for key in params:
            np.testing.assert_allclose(updates[key], expected[key], rtol=2e-5)


def test_learning_rate_rises_stays_and_falls() -> None:
    rates = np.array([float(learning_rate(2.0, 100, jnp.asarray(step))) for step in range(100)])
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)  # 5 % of the steps
    np.testing.assert_allclose(rates[5:80], 2.0, rtol=1e-6)
    np.testing.assert_allclose(rates[80:], np.linspace(2.0, 0.1, 20), rtol=1e-5)  # the next step would have 0
    assert float(learning_rate(2.0, 10**6, jnp.asarray(499))) == pytest.approx(1.0)  # at most 1,000 warm-up steps


@pytest.mark.parametrize("total_steps", [1, 2, 7])
def test_the_shortest_runs_have_a_positive_rate(total_steps: int) -> None:
    for step in range(total_steps):
        assert 0 < float(learning_rate(1.0, total_steps, jnp.asarray(step))) <= 1
