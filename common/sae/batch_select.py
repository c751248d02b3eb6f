"""The largest entries of a whole batch at once, exactly, without sorting it.

A cut between the n-th and the next largest entry is found by bisection on the bits of the floats, which are ordered as
the floats are: a count of the entries above some 20 cuts in place of a sort. As in ``select``, the maxima of groups of
columns come first: the n largest entries lie in the n groups with the largest maxima, so that most counts read a
sixteenth of the batch.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.bit_words import counts, entries, first_bits, words
from saex_pipe.common.sae.cuts import between, count_from, counts_in_lanes
from saex_pipe.common.sae.select import GROUP, Scores, as_they_are, every_column, group_maxima

HALF = 16  # bits of an int32, halved
COUNTED = 1 << 10  # entries that are counted side by side, however rows are cut
TRIED = 7  # thresholds that TPUs count for in one pass, which takes them as long as to read the values
SMALLEST = np.float32(np.finfo(np.float32).tiny)  # what is below it counts as 0


def cut(values: Float[Array, "*shape"], count: int | Int[Array, ""]) -> Float[Array, ""]:
    """A value that ``count`` of the non-negative float32 ``values`` are at or above, all positive.

    More are where several equal the ``count``-th largest, fewer where fewer are positive. Works on any layout of
    ``values`` over devices: it only counts. 2^31 of them and more may be on a mesh.

    Raises:
        InputError: there are so many, in more than 2^16 rows.
    """
    if values.size >= 1 << 31 and values.size // values.shape[-1] > 1 << HALF:
        raise InputError(f"a batch of {values.size:,} codes is too large to select from", "lower the rows of a batch")
    bits, count = jax.lax.bitcast_convert_type(values, jnp.int32), jnp.asarray(count, jnp.int32)
    edge = jax.lax.platform_dependent(bits, count, tpu=partial(narrowed, tried=TRIED), default=narrowed)
    return jax.lax.bitcast_convert_type(edge, jnp.float32)


def narrowed(bits: Int[Array, "*shape"], count: Int[Array, ""], tried: int = 1) -> Int[Array, ""]:
    """``cut`` of bits of floats that are not negative, with ``tried`` thresholds counted for in each pass.

    With seven there are 11 passes at most, with one 31; XLA's CPU compiler would read all values for each of the seven.
    """

    def at_or_above(least: Array) -> Int[Array, ""]:
        if bits.size < 1 << 31:
            return jnp.sum(bits >= least, dtype=jnp.int32)
        return capped_sum(jnp.sum(bits >= least, axis=-1, dtype=jnp.int32))

    def narrow(bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        step = jnp.maximum((high - low) // (tried + 1), 1)
        least_T = jnp.minimum(low + step * jnp.arange(1, tried + 1, dtype=jnp.int32), high)
        found_T = jnp.stack([at_or_above(least) for least in least_T])
        low = jnp.maximum(low, jnp.max(jnp.where(found_T >= count, least_T, low)))
        above = jnp.min(jnp.where(found_T < count, least_T, high))
        # Exactly as many: the bracket closes.
        return low, jnp.where(jnp.any(found_T == count), low + 1, above)

    low = jnp.asarray(SMALLEST.view(np.int32))
    start = low, jnp.maximum(jnp.max(bits), low) + 1
    return jax.lax.while_loop(lambda bracket: bracket[1] - bracket[0] > 1, narrow, start)[0]


def capped_sum(counts: Int[Array, "*shape"]) -> Int[Array, ""]:
    """The sum of at most 2^16 numbers that are not negative, or what an int32 can be at most."""
    low = jnp.sum((counts & ((1 << HALF) - 1)).astype(jnp.uint32), dtype=jnp.uint32)
    # 2^16 upper halves are below 2^31 together, and so are 2^16 lower ones above their own lower half.
    high = jnp.sum(counts >> HALF, dtype=jnp.int32) + (low >> HALF).astype(jnp.int32)
    whole = (high << HALF) | (low & ((1 << HALF) - 1)).astype(jnp.int32)
    return jnp.where(high >= 1 << (HALF - 1), jnp.int32(np.iinfo(np.int32).max), whole)


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
        rows_P, columns_P, taken_P = _compacted(of(u_BF, every_column), most, count)
        return rows_P * columns + columns_P, taken_P
    rows_P, groups_P, held_P = _compacted(group_maxima(u_BF, of), most, most)
    first_P = rows_P * columns + groups_P
    places_PR = first_P[:, None] + groups * jnp.arange(GROUP, dtype=jnp.int32)[None]
    scores_PR = of(u_BF.reshape(-1)[places_PR], lambda vector_F: vector_F[places_PR % columns])
    candidates_PR = jnp.where(held_P[:, None], scores_PR, 0.0)
    chosen_P, rank_P, taken_P = _compacted(candidates_PR, most, count)
    return jnp.where(taken_P, first_P[chosen_P] + groups * rank_P, 0), taken_P


def _refuse_too_many(values: Array) -> None:
    if values.size >= 1 << 31:
        raise InputError(f"a batch of {values.size:,} codes is too large to select from", "lower the rows of a batch")


def _compacted(values_RN: Array, most: int, count: int | Array) -> tuple[Array, Array, Array]:
    """Rows and columns of the ``count`` largest, row by row, in arrays of ``most``, and which of these are in use."""
    bits_RN = jax.lax.bitcast_convert_type(values_RN, jnp.int32)
    # Rows that are cut otherwise are computed again in that order, which takes longer than counting does.
    counted_RC = bits_RN if counts_in_lanes(bits_RN) else bits_RN.reshape(-1, math.gcd(bits_RN.size, COUNTED))
    low = jnp.asarray(SMALLEST.view(np.int32))
    high = jnp.maximum(jnp.max(bits_RN), low) + 1
    edge = between(lambda least: jnp.sum(count_from(counted_RC, least[None, None]), dtype=jnp.int32), count, low, high)
    above_RW, at_RW = words(bits_RN, lambda part: part > edge), words(bits_RN, lambda part: part == edge)
    # Only entries equal to the edge can be too many.
    left = jnp.asarray(count, jnp.int32) - jnp.sum(counts(above_RW), dtype=jnp.int32)
    kept_RW = first_bits(at_RW.reshape(1, -1), left[None, None]).reshape(at_RW.shape)
    return entries(above_RW | kept_RW, most)
