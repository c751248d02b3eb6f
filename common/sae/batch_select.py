"""The largest entries of a whole batch at once, exactly, without sorting it.

A cut between the n-th and the next largest entry is found by bisection on the bits of the floats, which are ordered as
the floats are: a count of the entries above some 20 cuts in place of a sort. As in ``select``, the maxima of groups of
columns come first: the n largest entries lie in the n groups with the largest maxima, so that most counts read a
sixteenth of the batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.select import (
    GROUP,
    Scores,
    as_they_are,
    every_column,
    group_maxima,
    running_counts,
    through_rows,
)

SMALLEST = np.float32(np.finfo(np.float32).tiny)  # what is below it counts as 0


def cut(values: Float[Array, "*shape"], count: int | Int[Array, ""]) -> Float[Array, ""]:
    """A value that ``count`` of the non-negative float32 ``values`` are at or above, all positive.

    More are where several equal the ``count``-th largest, fewer where fewer are positive. Works on any layout of
    ``values`` over devices: it only counts.

    Raises:
        InputError: there are more values than an int32 counts.
    """
    _refuse_too_many(values)
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    wanted = jnp.asarray(count, jnp.int32)

    def narrow(bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = low + (high - low) // 2
        found = jnp.sum(bits >= middle, dtype=jnp.int32)
        # Exactly as many: the bracket closes.
        return jnp.where(found >= wanted, middle, low), jnp.where(
            found > wanted, high, jnp.where(found < wanted, middle, middle + 1)
        )

    low = jnp.asarray(SMALLEST.view(np.int32))
    high = jnp.maximum(jnp.max(bits), low) + 1
    low, _ = jax.lax.while_loop(lambda bracket: bracket[1] - bracket[0] > 1, narrow, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def largest(
    u_BF: Float[Array, "B F"], most: int, count: int | Int[Array, ""], of: Scores = as_they_are
) -> tuple[Int[Array, " P"], Bool[Array, " P"]]:
    """Places (row F + column, int32) of the ``count`` largest positive scores, and which of them are taken.

    Exactly ``count`` are taken, or all that are positive where those are fewer; of equal entries at the end any.
    ``most`` is the static length P of the result, at least ``count``. The places of what is not taken are 0.
    """
    _refuse_too_many(u_BF)
    rows, columns = u_BF.shape
    groups = columns // GROUP
    if columns % GROUP or rows * groups <= most:  # too few groups to leave anything out
        return _compacted(of(u_BF, every_column), most, count)
    groups_P, held_P = _compacted(group_maxima(u_BF, of), most, most)
    first_P = groups_P // groups * columns + groups_P % groups
    places_PR = first_P[:, None] + groups * jnp.arange(GROUP, dtype=jnp.int32)[None]
    scores_PR = of(u_BF.reshape(-1)[places_PR], lambda vector_F: vector_F[places_PR % columns])
    candidates_PR = jnp.where(held_P[:, None], scores_PR, 0.0)
    chosen_P, taken_P = _compacted(candidates_PR, most, count)
    return jnp.where(taken_P, places_PR.reshape(-1)[chosen_P], 0), taken_P


def _refuse_too_many(values: Array) -> None:
    if values.size >= 1 << 31:
        raise InputError(f"a batch of {values.size:,} codes is too large to select from", "lower the rows of a batch")


def _compacted(values_RN: Array, most: int, count: int | Array) -> tuple[Array, Array]:
    """Places (in the rows one after another) of the ``count`` largest, rising, in an array of ``most``, and which of
    these are in use."""
    edge, count = cut(values_RN, count), jnp.asarray(count, jnp.int32)
    above_RN, at_RN = map(through_rows, running_counts(values_RN > edge, values_RN == edge))
    # Only entries equal to the edge can be too many.
    running_RN = above_RN + jnp.minimum(at_RN, count - above_RN[-1, -1])
    places_P = jnp.searchsorted(running_RN.reshape(-1), 1 + jnp.arange(most, dtype=jnp.int32))
    taken_P = jnp.arange(most, dtype=jnp.int32) < running_RN[-1, -1]
    return jnp.where(taken_P, places_P, 0).astype(jnp.int32), taken_P
