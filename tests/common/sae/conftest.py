"""Toy data with a known dictionary. Strict JAX settings come from ``tests/conftest.py``."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

WIDTH, FEATURES, ACTIVE = 16, 24, 3


@pytest.fixture(scope="session")
def toy_rows() -> Callable[..., jax.Array]:
    """``toy_rows(seed, rows)``: sums of three features of one random unit dictionary, about a mean that is not 0."""
    dictionary_FD = np.random.default_rng(99).normal(size=(FEATURES, WIDTH))
    dictionary_FD /= np.linalg.norm(dictionary_FD, axis=1, keepdims=True)

    def generate(seed: int, rows: int = 96) -> jax.Array:
        rng = np.random.default_rng(seed)
        codes_BF = np.zeros((rows, FEATURES))
        for row_F in codes_BF:
            row_F[rng.choice(FEATURES, ACTIVE, replace=False)] = rng.uniform(0.5, 1.5, ACTIVE)
        return jnp.asarray(codes_BF @ dictionary_FD + 0.5, jnp.float32)

    return generate
