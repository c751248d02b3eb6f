"""The k largest entries of long rows, faster than one ``lax.top_k`` over them."""

import math
from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saex_pipe.common.sae.compute import Compute

GROUP = 16  # columns per group
CUT_K = range(16, 65)  # entries a row for which CPUs look for a cut: 5.6 ms, not 11, for 32 of 576 in 2,048 rows
SMALL_GROUP = 4  # columns per group of those that are in cache
CUT_BYTES = 1 << 21  # of the rows whose cuts CPUs look for at once: 64 ms where all 2,048 rows of 9,216 take 262


# Scores of a part of a matrix product u_BF: the part [B, C], and what picks the same columns of a vector [F], to [B, C]
# or [1, C]. A function, as scores that are written down whole cost 10 ms of a step more than those computed in passing.
Scores = Callable[[Array, Callable[[Array], Array]], Array]


def every_column(vector_F: Float[Array, " F"]) -> Float[Array, "1 F"]:
    """The pick of all columns."""
    return vector_F[None]


def as_they_are(u_BC: Array, pick: Callable[[Array], Array]) -> Array:
    """Scores that are the product itself."""
    del pick
    return u_BC


def largest(
    u_BF: Float[Array, "B F"], k: int, compute: Compute, of: Scores = as_they_are
) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """Scores, largest first, and columns (int32) of the ``k`` largest scores of each row: all of them, or an
    expected share ``compute.recall`` of them and others in their place, which TPUs find in one pass (elsewhere it is
    exact).

    TPU-KNN: K nearest neighbor search at peak FLOP/s. Felix Chern, Blake Hechtman, Andy Davis, Ruiqi Guo, David
    Majnemer, Sanjiv Kumar. 2022. https://arxiv.org/abs/2206.14286
    """
    if compute.selection == "exact":
        return top_k(u_BF, k, of)
    return jax.lax.approx_max_k(of(u_BF, every_column), k, recall_target=compute.recall)


def top_k(u_BF: Float[Array, "B F"], k: int, of: Scores = as_they_are) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """Scores, largest first, and columns (int32) of the ``k`` largest scores of each row. Exact.

    The k largest entries lie in the k groups with the largest maxima, so two selections, among F / 16 maxima and
    among 16 k candidates, replace one among F. Which of several equal entries is taken is fixed, but need not be the
    first one.
    """
    columns = u_BF.shape[1]
    groups = columns // GROUP
    if columns % GROUP or groups < 4 * k:  # too few groups to leave anything out
        return jax.lax.top_k(of(u_BF, every_column), k)
    columns_BC = _columns_of(_row_places(group_maxima(u_BF, of), k), groups, GROUP)
    candidates_BC = of(jnp.take_along_axis(u_BF, columns_BC, axis=1), lambda vector_F: vector_F[columns_BC])
    values_BK, places_BK = _row_top_k(candidates_BC, k)
    return values_BK, jnp.take_along_axis(columns_BC, places_BK, axis=1)


def group_maxima(u_BF: Float[Array, "B F"], of: Scores = as_they_are, size: int = GROUP) -> Float[Array, "B G"]:
    """The largest score of each group of ``size`` columns; column c is in group c % G.

    Maxima are so elementwise over whole rows, in one pass over ``u_BF``.
    """
    groups = u_BF.shape[1] // size
    starts = range(0, u_BF.shape[1], groups)

    def part(start: int) -> Array:
        return of(u_BF[:, start : start + groups], lambda vector_F: vector_F[None, start : start + groups])

    return reduce(jnp.maximum, map(part, starts))


def _columns_of(groups_BK: Int[Array, "B K"], groups: int, size: int) -> Int[Array, "B C"]:
    """The columns of the groups that ``group_maxima`` makes."""
    first_R = groups * jnp.arange(size, dtype=jnp.int32)
    return (first_R[None, :, None] + groups_BK[:, None, :]).reshape(groups_BK.shape[0], -1)


def _row_top_k(values_BN: Float[Array, "B N"], k: int) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """``lax.top_k``; on CPUs, where that keeps to one core, by way of ``row_cuts``."""

    def plain(values_BN: Array) -> tuple[Array, Array]:
        values_BK, places_BK = jax.lax.top_k(values_BN, k)
        return values_BK, places_BK

    def by_cut(values_BN: Array) -> tuple[Array, Array]:
        return _largest_first(values_BN, _in_blocks(partial(_places_by_cut, k=k), values_BN))

    return jax.lax.platform_dependent(values_BN, cpu=by_cut if k in CUT_K else plain, default=plain)


def _row_places(values_BN: Float[Array, "B N"], k: int) -> Int[Array, "B K"]:
    """Columns of the ``k`` largest entries of each row, rising."""

    def plain(values_BN: Array) -> Array:
        return jnp.sort(jax.lax.top_k(values_BN, k)[1], axis=1)

    by_cut = partial(_in_blocks, partial(_places_by_cut, k=k)) if k in CUT_K else plain
    return jax.lax.platform_dependent(values_BN, cpu=by_cut, default=plain)


def _places_by_cut(values_BN: Array, k: int) -> Array:
    groups = values_BN.shape[1] // SMALL_GROUP
    if values_BN.shape[1] % SMALL_GROUP == 0 and groups >= 8 * k:
        columns_BC = _columns_of(_places_by_cut(group_maxima(values_BN, size=SMALL_GROUP), k), groups, SMALL_GROUP)
        places_BK = _places_by_cut(jnp.take_along_axis(values_BN, columns_BC, axis=1), k)
        return jnp.sort(jnp.take_along_axis(columns_BC, places_BK, axis=1), axis=1)
    known_BN, number_K = _known(values_BN), 1 + jnp.arange(k, dtype=jnp.int32)
    bits_BN, cut_B1 = _ordered_bits(known_BN), _ordered_bits(_cuts(known_BN, k, None))
    above_BN, at_BN = running_counts(bits_BN > cut_B1, bits_BN == cut_B1)
    taken_BN = above_BN + jnp.minimum(at_BN, k - above_BN[:, -1:])
    return jax.vmap(lambda taken_N: jnp.searchsorted(taken_N, number_K))(taken_BN).astype(jnp.int32)


def _largest_first(values_BN: Array, places_BK: Array) -> tuple[Array, Array]:
    """Values and places by value: each goes to the place that is the number of those before it."""
    values_BK = jnp.take_along_axis(values_BN, places_BK, axis=1)
    bits_BK, order_K = _ordered_bits(_known(values_BK)), jnp.arange(places_BK.shape[1], dtype=jnp.int32)
    equal_BKK = (bits_BK[:, None] == bits_BK[:, :, None]) & (order_K[None, None] < order_K[None, :, None])
    before_BK = jnp.sum((bits_BK[:, None] > bits_BK[:, :, None]) | equal_BKK, axis=2, dtype=jnp.int32)
    here_BKK = before_BK[:, None] == order_K[None, :, None]
    return jnp.sum(jnp.where(here_BKK, values_BK[:, None], 0.0), axis=2), jnp.sum(
        jnp.where(here_BKK, places_BK[:, None], 0), axis=2, dtype=jnp.int32
    )


def _known(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """What is not a number as infinite, so that it is chosen and seen."""
    return jnp.where(jnp.isnan(values), jnp.inf, values)


def running_counts(
    above_RN: Bool[Array, "R N"], at_RN: Bool[Array, "R N"]
) -> tuple[Int[Array, "R N"], Int[Array, "R N"]]:
    """Of each row how many entries up to here are ``above``, and how many ``at``."""
    if above_RN.shape[1] >= 1 << 15:
        return jnp.cumsum(above_RN, axis=1, dtype=jnp.int32), jnp.cumsum(at_RN, axis=1, dtype=jnp.int32)
    both_RN = jnp.cumsum(above_RN.astype(jnp.int32) + (at_RN.astype(jnp.int32) << 16), axis=1)  # in one pass
    return both_RN & 0xFFFF, both_RN >> 16


def through_rows(counts_RN: Int[Array, "R N"]) -> Int[Array, "R N"]:
    """Running counts of each row, that go on from row to row."""
    ends_R = jnp.cumsum(counts_RN[:, -1])
    return counts_RN + (ends_R - counts_RN[:, -1])[:, None]


def row_cuts(values_BF: Float[Array, "B F"], k: int, axis: str | None = None) -> Float[Array, "B 1"]:
    """A value for each row that its ``k`` largest entries are at or above, and those equal to the last of them.

    For ``top_k`` on CPUs, and for a k too large for it: bisection on the bits of the floats, which are ordered as the
    floats are once those of negative ones are turned round. Some 25 counts, whatever k is, where ``lax.top_k`` of 288
    among 9,216 takes two seconds for 2,048 rows on two CPU cores. ``axis`` names that axis of a mesh that the columns
    lie over, if they do.
    """
    if axis is not None:
        return _cuts(values_BF, k, axis)
    whole = partial(_cuts, k=k, axis=None)
    return jax.lax.platform_dependent(values_BF, cpu=partial(_in_blocks, whole), default=whole)


def _in_blocks(function: Callable[[Array], Array], values_BN: Float[Array, "B N"]) -> Array:
    """``function``, which gives K columns, of blocks of rows that fit into cache, one after another."""
    rows, columns = values_BN.shape
    block = math.gcd(rows, 1 << (max(1, CUT_BYTES // (4 * columns)).bit_length() - 1))
    found_NBK = jax.lax.map(function, values_BN.reshape(-1, block, columns))
    return found_NBK.reshape(rows, found_NBK.shape[-1])


def _cuts(values_BF: Array, k: int, axis: str | None) -> Array:
    bits_BF = _ordered_bits(values_BF)

    def narrow(bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B1, high_B1 = bracket
        middle_B1 = (low_B1 >> 1) + (high_B1 >> 1) + (low_B1 & high_B1 & 1)  # their mean, without overflow
        found_B1 = jnp.sum(bits_BF >= middle_B1, axis=1, keepdims=True, dtype=jnp.int32)
        if axis is not None:
            found_B1 = jax.lax.psum(found_B1, axis)
        # Exactly k: the bracket closes.
        return jnp.where(found_B1 >= k, middle_B1, low_B1), jnp.where(
            found_B1 > k, high_B1, jnp.where(found_B1 < k, middle_B1, middle_B1 + 1)
        )

    low_B1 = jnp.full((values_BF.shape[0], 1), _ordered(jnp.float32(-jnp.inf).view(jnp.int32)), jnp.int32)
    high_B1 = jnp.full_like(low_B1, jnp.float32(jnp.inf).view(jnp.int32) + 1)
    if axis is None:
        found = jax.lax.while_loop(lambda bracket: jnp.any(bracket[1] - bracket[0] != 1), narrow, (low_B1, high_B1))
    else:  # as many rounds on every device, since they sum with each other
        found = jax.lax.fori_loop(0, 32, lambda _, bracket: narrow(bracket), (low_B1, high_B1))
    return jax.lax.bitcast_convert_type(_ordered(found[0]), jnp.float32)


def _ordered_bits(values: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Integers of the order of the floats."""
    return _ordered(jax.lax.bitcast_convert_type(values, jnp.int32))


def _ordered(bits: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Bits of floats as integers of the same order, and back."""
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
