"""The k largest entries of long rows, faster than one ``lax.top_k`` over them."""

from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex_pipe.common.sae.bit_words import first_bits, row_entries, total, words
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.cuts import (
    LANES,
    LOWEST,
    MOST_COUNTED,
    between,
    count_from,
    folded,
    in_blocks,
    ordered_bits,
    slices,
)

GROUP = 16  # columns per group
CUT_K = range(16, LANES + 1)  # entries a row for which CPUs look for a cut: 2.5 ms, not 11, for 32 of 576 in 2,048 rows
SMALL_GROUP = 4  # columns per group of those that are in cache


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
    columns_BC = _columns_of(_places(group_maxima(u_BF, of), k), groups, GROUP)
    candidates_BC = of(
        jnp.take_along_axis(u_BF, columns_BC, axis=1, mode="clip"), lambda vector_F: vector_F[columns_BC]
    )
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
    """The columns of the groups that ``group_maxima`` makes, those of a group together.

    That order is kind to caches: 512 of 9,216 are gathered from 2,048 rows in 2 ms, not 5 (two cores of Zen 5).
    """
    first_R = groups * jnp.arange(size, dtype=jnp.int32)
    return (groups_BK[:, :, None] + first_R[None, None]).reshape(groups_BK.shape[0], -1)


def _row_top_k(values_BN: Float[Array, "B N"], k: int) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """``lax.top_k``; on CPUs, where that keeps to one core, by way of a cut."""

    def by_cut(values_BN: Array) -> tuple[Array, Array]:
        return _largest_first(values_BN, _places_by_cut(values_BN, k))

    plain = partial(_plain, k=k)
    return jax.lax.platform_dependent(values_BN, cpu=by_cut if _has_cut(values_BN, k) else plain, default=plain)


def _places(values_BN: Float[Array, "B N"], k: int) -> Int[Array, "B K"]:
    """Columns of the ``k`` largest entries of each row, in any order."""

    def plain(values_BN: Array) -> Array:
        return _plain(values_BN, k)[1]

    by_cut = partial(_places_by_cut, k=k) if _has_cut(values_BN, k) else plain
    return jax.lax.platform_dependent(values_BN, cpu=by_cut, default=plain)


def _plain(values_BN: Array, k: int) -> tuple[Array, Array]:
    values_BK, places_BK = jax.lax.top_k(values_BN, k)
    return values_BK, places_BK


def _has_cut(values_BN: Array, k: int) -> bool:
    columns = values_BN.shape[1]
    return k in CUT_K and (columns <= MOST_COUNTED or columns % SMALL_GROUP == 0)


def _places_by_cut(values_BN: Array, k: int) -> Array:
    columns = values_BN.shape[1]
    if columns <= MOST_COUNTED:
        return in_blocks(partial(_places_in_block, k=k), values_BN)
    groups_BK = _places(group_maxima(values_BN, size=SMALL_GROUP), k)
    columns_BC = _columns_of(groups_BK, columns // SMALL_GROUP, SMALL_GROUP)
    places_BK = _places(jnp.take_along_axis(values_BN, columns_BC, axis=1, mode="clip"), k)
    return jnp.take_along_axis(columns_BC, places_BK, axis=1)


def _places_in_block(values_BN: Array, k: int) -> Array:
    missing = -values_BN.shape[1] % LANES
    bits_BN = jnp.pad(ordered_bits(_known(values_BN)), ((0, 0), (0, missing)), constant_values=LOWEST)
    lanes_BL = reduce(jnp.maximum, slices(bits_BN))
    # At or above the least of the lanes' maxima are as many entries as there are lanes, which is k or more. No lane is
    # of padding alone: rows have 4 k entries or more, which is as many as there are lanes.
    low_B1, high_B1 = folded(lanes_BL, jnp.minimum), folded(lanes_BL, jnp.maximum) + 1
    cut_B1 = between(partial(count_from, bits_BN), k, low_B1, high_B1)
    above_BW, at_BW = words(bits_BN, lambda part: part > cut_B1), words(bits_BN, lambda part: part == cut_B1)
    return row_entries(above_BW | first_bits(at_BW, k - total(above_BW)), k)


def _largest_first(values_BN: Array, places_BK: Array) -> tuple[Array, Array]:
    """Values and places by value: each goes to the place that is the number of those before it."""
    values_BK = jnp.take_along_axis(values_BN, places_BK, axis=1)
    bits_BK, order_K = ordered_bits(_known(values_BK)), jnp.arange(places_BK.shape[1], dtype=jnp.int32)
    equal_BKK = (bits_BK[:, None] == bits_BK[:, :, None]) & (order_K[None, None] < order_K[None, :, None])
    before_BK = jnp.sum((bits_BK[:, None] > bits_BK[:, :, None]) | equal_BKK, axis=2, dtype=jnp.int32)
    here_BKK = before_BK[:, None] == order_K[None, :, None]
    return jnp.sum(jnp.where(here_BKK, values_BK[:, None], 0.0), axis=2), jnp.sum(
        jnp.where(here_BKK, places_BK[:, None], 0), axis=2, dtype=jnp.int32
    )


def _known(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """What is not a number as infinite, so that it is chosen and seen."""
    return jnp.where(jnp.isnan(values), jnp.inf, values)
