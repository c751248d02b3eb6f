"""The k largest entries of long rows, faster than one ``lax.top_k`` over them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex_pipe.common.sae.compute import Compute

GROUP = 16  # columns per group


def largest(z_BF: Float[Array, "B F"], k: int, compute: Compute) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """Values, largest first, and columns (int32) of the ``k`` largest entries of each row: all of them, or an expected
    share ``compute.recall`` of them and others in their place, which TPUs find in one pass (elsewhere it is exact).

    TPU-KNN: K nearest neighbor search at peak FLOP/s. Felix Chern, Blake Hechtman, Andy Davis, Ruiqi Guo, David
    Majnemer, Sanjiv Kumar. 2022. https://arxiv.org/abs/2206.14286
    """
    if compute.selection == "exact":
        return top_k(z_BF, k)
    return jax.lax.approx_max_k(z_BF, k, recall_target=compute.recall)


def top_k(z_BF: Float[Array, "B F"], k: int) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """Values, largest first, and columns (int32) of the ``k`` largest entries of each row. Exact.

    The k largest entries lie in the k groups with the largest maxima, so two selections, among F / 16 maxima and
    among 16 k candidates, replace one among F. Which of several equal entries is taken is fixed, but need not be the
    first one.
    """
    columns = z_BF.shape[1]
    groups = columns // GROUP
    if columns % GROUP or groups < 4 * k:  # too few groups to leave anything out
        return jax.lax.top_k(z_BF, k)
    # Column c is in group c % groups: the maxima are then elementwise over whole rows.
    maxima_BG = jnp.max(z_BF.reshape(-1, GROUP, groups), axis=1)
    groups_BK = jnp.sort(jax.lax.top_k(maxima_BG, k)[1], axis=1)
    first_column_R = groups * jnp.arange(GROUP, dtype=jnp.int32)
    columns_BC = (first_column_R[None, :, None] + groups_BK[:, None, :]).reshape(-1, GROUP * k)
    values_BK, places_BK = jax.lax.top_k(jnp.take_along_axis(z_BF, columns_BC, axis=1), k)
    return values_BK, jnp.take_along_axis(columns_BC, places_BK, axis=1)
