"""The geometric median: the point with the smallest sum of distances to all rows.

    y* = argmin_y sum_i ||x_i - y||

by the iteration of Weiszfeld as mended for iterates that coincide with rows: The multivariate L1-median and associated
data depth. Yehuda Vardi, Cun-Hui Zhang. 2000. https://doi.org/10.1073/pnas.97.4.1423

    R = sum_{x_i != y} (x_i - y) / ||x_i - y||      y <- y + max(0, 1 - n / ||R||) R / sum_{x_i != y} 1 / ||x_i - y||

with n rows at y. It stops at a row exactly where that row is the median, ||R|| <= n.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

TOLERANCE = 1e-6  # of the mean distance from the mean: steps below it end the iteration, rows so near coincide
MOST_STEPS = 1000


def geometric_median(rows_ND: Float[Array, "N D"]) -> Float[Array, " D"]:
    """Of float32 rows, in their units, to about ``TOLERANCE`` of their spread; may be jitted."""
    mean_D = jnp.mean(rows_ND, axis=0)
    centred_ND = rows_ND - mean_D[None]  # the rows' spread may be small beside their mean
    tiny = TOLERANCE * jnp.mean(jnp.linalg.norm(centred_ND, axis=1))

    def step(y_D: Array) -> Array:
        away_ND = centred_ND - y_D[None]
        distance_N = jnp.linalg.norm(away_ND, axis=1)
        apart_N = distance_N > tiny
        weight_N = jnp.where(apart_N, 1 / jnp.where(apart_N, distance_N, 1.0), 0.0)
        pull_D = jnp.sum(weight_N[:, None] * away_ND, axis=0)
        holding = jnp.sum(~apart_N, dtype=jnp.float32)
        share = jnp.maximum(0.0, 1 - holding / jnp.maximum(jnp.linalg.norm(pull_D), jnp.finfo(jnp.float32).tiny))
        return share * pull_D / jnp.maximum(jnp.sum(weight_N), jnp.finfo(jnp.float32).tiny)

    def unfinished(at: tuple[Array, Array, Array]) -> Array:
        _, moved_D, steps = at
        return (jnp.linalg.norm(moved_D) > tiny) & (steps < MOST_STEPS)

    def go_on(at: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        y_D, moved_D, steps = at
        y_D = y_D + moved_D
        return y_D, step(y_D), steps + 1

    start_D = jnp.zeros_like(mean_D)
    y_D, moved_D, _ = jax.lax.while_loop(unfinished, go_on, (start_D, step(start_D), jnp.int32(0)))
    return mean_D + y_D + moved_D
