"""The geometric median against a float64 minimisation, and where rows coincide with the iterate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from saex_pipe.common.sae.geometric_median import geometric_median

MEDIAN = jax.jit(geometric_median)


def minimised(rows_ND: np.ndarray) -> np.ndarray:
    """By BFGS from several starts, in float64."""

    def total(y_D: np.ndarray) -> tuple[float, np.ndarray]:
        away_ND = y_D - rows_ND
        distance_N = np.linalg.norm(away_ND, axis=1)
        return distance_N.sum(), (away_ND / distance_N[:, None]).sum(axis=0)

    start_D = np.median(rows_ND, axis=0) + 1e-3
    found = scipy.optimize.minimize(total, start_D, jac=True, options={"gtol": 1e-10, "maxiter": 1000})
    return found.x


@pytest.mark.parametrize(("rows", "width", "offset"), [(101, 2, 0.0), (60, 7, 0.0), (200, 7, 1000.0), (12, 20, 5.0)])
def test_it_is_the_minimum(rows: int, width: int, offset: float) -> None:
    rng = np.random.default_rng(rows)
    rows_ND = (rng.standard_t(2, size=(rows, width)) + offset).astype(np.float32)
    expected_D = minimised(rows_ND.astype(np.float64))
    spread = np.linalg.norm(rows_ND - rows_ND.mean(axis=0), axis=1).mean()
    assert np.linalg.norm(rows_ND.mean(axis=0) - expected_D) > 0.01 * spread, "the mean must not do"
    found_D = np.asarray(MEDIAN(jnp.asarray(rows_ND)), np.float64)
    np.testing.assert_allclose(found_D, expected_D, atol=2e-5 * spread + 1e-7 * offset)


def test_it_leaves_a_row_that_is_the_mean_but_not_the_median() -> None:
    rows_ND = np.array([[0, 0], [4, 0], [-1, 1], [-1, -1], [-2, 0]], np.float32)
    np.testing.assert_array_equal(rows_ND.mean(axis=0), rows_ND[0])
    expected_D = minimised(rows_ND.astype(np.float64))
    assert np.linalg.norm(expected_D) > 0.1
    np.testing.assert_allclose(MEDIAN(jnp.asarray(rows_ND)), expected_D, atol=1e-4)


def test_it_stays_at_a_row_that_is_the_median() -> None:
    # The others pull with 1.41, the three hold with 3; an iteration without that would leave and come back.
    rows_ND = np.array([[0, 0]] * 3 + [[4, 0], [-1, 1], [-1, -1], [-2, 0]], np.float32)
    np.testing.assert_array_equal(MEDIAN(jnp.asarray(rows_ND)), [0, 0])
    moved_ND = jnp.asarray(np.concatenate([rows_ND, [[3, 0]]]), jnp.float32)
    assert float(jnp.linalg.norm(moved_ND.mean(axis=0))) > 0.1
    np.testing.assert_allclose(MEDIAN(moved_ND), [0, 0], atol=1e-5)


def test_rows_that_are_all_one_are_their_median() -> None:
    np.testing.assert_array_equal(MEDIAN(jnp.full((8, 3), 2.5)), np.full(3, 2.5, np.float32))
