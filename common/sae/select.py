"""The k largest entries of long rows, faster than one ``lax.top_k`` over them."""

import math
from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex_pipe.common.sae.compute import Compute

GROUP = 16  # columns per group
PARTS = 4  # of the rows, that several cores select from
CUT_BYTES = 1 << 22  # of the rows whose cuts CPUs look for at once: 64 ms where all 2,048 rows of 9,216 take 262


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
    groups_BK = jnp.sort(_split_top_k(group_maxima(u_BF, of), k)[1], axis=1)
    first_column_R = groups * jnp.arange(GROUP, dtype=jnp.int32)
    columns_BC = (first_column_R[None, :, None] + groups_BK[:, None, :]).reshape(-1, GROUP * k)
    candidates_BC = of(jnp.take_along_axis(u_BF, columns_BC, axis=1), lambda vector_F: vector_F[columns_BC])
    values_BK, places_BK = _split_top_k(candidates_BC, k)
    return values_BK, jnp.take_along_axis(columns_BC, places_BK, axis=1)


def group_maxima(u_BF: Float[Array, "B F"], of: Scores) -> Float[Array, "B G"]:
    """The largest score of each group of ``GROUP`` columns; column c is in group c % G.

    Maxima are so elementwise over whole rows, in one pass over ``u_BF``.
    """
    groups = u_BF.shape[1] // GROUP
    starts = range(0, u_BF.shape[1], groups)

    def part(start: int) -> Array:
        return of(u_BF[:, start : start + groups], lambda vector_F: vector_F[None, start : start + groups])

    return reduce(jnp.maximum, map(part, starts))


def _split_top_k(values_BN: Float[Array, "B N"], k: int) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """``lax.top_k``, on CPUs in ``PARTS`` calls, as each of them keeps to one core."""

    def in_parts(values_BN: Array) -> list[Array]:
        parts = [jax.lax.top_k(part, k) for part in jnp.split(values_BN, PARTS)]
        return [jnp.concatenate(found) for found in zip(*parts, strict=True)]

    if values_BN.shape[0] % PARTS:
        return jax.lax.top_k(values_BN, k)
    found = jax.lax.platform_dependent(values_BN, cpu=in_parts, default=lambda values_BN: jax.lax.top_k(values_BN, k))
    return found[0], found[1]


def row_cuts(values_BF: Float[Array, "B F"], k: int, axis: str | None = None) -> Float[Array, "B 1"]:
    """A value for each row that its ``k`` largest entries are at or above, and those equal to the last of them.

    For a k too large for ``top_k``: bisection on the bits of the floats, which are ordered as the floats are once those
    of negative ones are turned round. Some 25 counts, whatever k is, where ``lax.top_k`` of 288 among 9,216 takes two
    seconds for 2,048 rows on two CPU cores. ``axis`` names the axis of a mesh that the columns lie over, if they do.
    """
    rows = values_BF.shape[0]
    block = math.gcd(rows, 1 << (max(1, CUT_BYTES // (4 * values_BF.shape[1])).bit_length() - 1))

    def in_blocks(values_BF: Array) -> Array:
        blocks_NBF = values_BF.reshape(-1, block, values_BF.shape[1])
        return jax.lax.map(lambda block_BF: _cuts(block_BF, k, axis), blocks_NBF).reshape(rows, 1)

    if axis is not None:
        return _cuts(values_BF, k, axis)
    return jax.lax.platform_dependent(values_BF, cpu=in_blocks, default=lambda values_BF: _cuts(values_BF, k, None))


def _cuts(values_BF: Array, k: int, axis: str | None) -> Array:
    bits_BF = _ordered(jax.lax.bitcast_convert_type(values_BF, jnp.int32))

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


def _ordered(bits: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Bits of floats as integers of the same order, and back."""
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
