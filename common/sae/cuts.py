"""The k-th largest entry of each row, by bisection on the bits of the floats.

These are ordered as the floats are once those of negative ones are turned round: some 20 counts of the entries at or
above a value, whatever k is, in place of a sort.
"""

import math
from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

CUT_BYTES = 1 << 21  # of the rows whose cuts CPUs look for at once: 64 ms where all 2,048 rows of 9,216 take 262
LANES = 64  # entries of a row that are counted side by side: what a sum over rows reads, XLA's CPU compiler writes down
MOST_COUNTED = 32 * LANES  # columns of a row that are counted so: each 64 are written out
LOWEST = np.iinfo(np.int32).min  # below the bits of all floats


def row_cuts(values_BF: Float[Array, "B F"], k: int, axis: str | None = None) -> Float[Array, "B 1"]:
    """A value for each row that its ``k`` largest entries are at or above, and those equal to the last of them.

    For a k too large for ``lax.top_k``, which takes two seconds for 288 among 9,216 in 2,048 rows on two CPU cores.
    ``axis`` names that axis of a mesh that the columns lie over, if they do.
    """
    if axis is not None:
        return _cuts(values_BF, k, axis)
    whole = partial(_cuts, k=k, axis=None)
    return jax.lax.platform_dependent(values_BF, cpu=partial(in_blocks, whole), default=whole)


def in_blocks(function: Callable[[Array], Array], values_BN: Float[Array, "B N"]) -> Array:
    """``function``, which gives K columns, of blocks of rows that fit into cache, one after another.

    At least two where the rows are even: the compiler takes a loop of one apart, and computes again what it finds for
    every use of it.
    """
    rows, columns = values_BN.shape
    block = math.gcd(rows, 1 << (max(1, CUT_BYTES // (4 * columns)).bit_length() - 1))
    if block == rows and rows % 2 == 0:
        block //= 2
    found_NBK = jax.lax.map(function, values_BN.reshape(-1, block, columns))
    return found_NBK.reshape(rows, found_NBK.shape[-1])


def between(
    count_from: Callable[[Array], Array], k: int | Array, low: Array, high: Array, *, same_rounds: bool = False
) -> Int[Array, "..."]:
    """A value that ``k`` entries are at or above, and those equal to the last of them.

    Args:
        count_from: how many entries are at least a value.
        k: of them are wanted.
        low: that many are at or above it, or it is what is found.
        high: fewer are.
        same_rounds: take as many on every device, as is needed where counts are summed over them.
    """

    def narrow(bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # their mean, without overflow
        found = count_from(middle)
        # Exactly k: the bracket closes.
        return jnp.where(found >= k, middle, low), jnp.where(found > k, high, jnp.where(found < k, middle, middle + 1))

    if same_rounds:
        return jax.lax.fori_loop(0, 32, lambda _, bracket: narrow(bracket), (low, high))[0]
    return jax.lax.while_loop(lambda bracket: jnp.any(bracket[1] - bracket[0] != 1), narrow, (low, high))[0]


def count_from(values_RN: Int[Array, "R N"], least_R1: Int[Array, "R 1"]) -> Int[Array, "R 1"]:
    """How many entries of each row are at least ``least``."""
    if not counts_in_lanes(values_RN):
        return jnp.sum(values_RN >= least_R1, axis=1, keepdims=True, dtype=jnp.int32)
    return folded(reduce(jnp.add, ((part >= least_R1).astype(jnp.int32) for part in slices(values_RN))), jnp.add)


def counts_in_lanes(values_RN: Array) -> bool:
    """Whether ``count_from`` counts the entries of such rows side by side."""
    return values_RN.shape[1] % LANES == 0 and values_RN.shape[1] <= MOST_COUNTED


def slices(values_RN: Array) -> list[Array]:
    """The row's entries by slices of ``LANES``."""
    return [values_RN[:, start : start + LANES] for start in range(0, values_RN.shape[1], LANES)]


def folded(lanes_RL: Array, join: Callable[[Array, Array], Array]) -> Array:
    """``join`` over the lanes of each row, a power of two, halved again and again."""
    while lanes_RL.shape[1] > 1:
        half = lanes_RL.shape[1] // 2
        lanes_RL = join(lanes_RL[:, :half], lanes_RL[:, half:])
    return lanes_RL


def ordered_bits(values: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Integers of the order of the floats."""
    return _ordered(jax.lax.bitcast_convert_type(values, jnp.int32))


def _cuts(values_BF: Array, k: int, axis: str | None) -> Array:
    low_B1 = jnp.full((values_BF.shape[0], 1), ordered_bits(jnp.float32(-jnp.inf)), jnp.int32)
    high_B1 = jnp.full_like(low_B1, ordered_bits(jnp.float32(jnp.inf)) + 1)
    bits_BF = ordered_bits(values_BF)

    def count(least_B1: Array) -> Array:
        found_B1 = count_from(bits_BF, least_B1)
        return found_B1 if axis is None else jax.lax.psum(found_B1, axis)

    cut_B1 = between(count, k, low_B1, high_B1, same_rounds=axis is not None)
    return jax.lax.bitcast_convert_type(_ordered(cut_B1), jnp.float32)


def _ordered(bits: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Bits of floats as integers of the same order, and back."""
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
