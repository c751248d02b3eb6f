"""Chosen entries of an array as bits, 32 of a row in a word, so that the n-th one is found in a few steps.

XLA's CPU compiler makes one pass of what is elementwise over slices of rows, and writes down what a sum or running sum
over rows reads. So here bits are set in slices, and words are told apart by their counts, with no running count of all
entries: 2.5 ms, not 6, find the 32 largest of 576 in 2,048 rows (two cores of Zen 5).
"""

import math
from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped, UInt32

WORD = 32
PARTS = 8  # of a list of entries
BLOCK = 16  # words that are told apart by their counts; blocks of them by a running maximum


def words(values_RN: Shaped[Array, "R N"], chosen: Callable[[Array], Array]) -> UInt32[Array, "R W"]:
    """Bit i of word w is whether entry ``i W + w`` is ``chosen``; W = N / 32, rounded up.

    ``chosen`` is of slices of the rows, elementwise: what is computed of whole rows would be written down.
    """
    columns = values_RN.shape[1]
    width = -(-columns // WORD)

    def bit(number: int) -> Array:
        part_RW = chosen(values_RN[:, number * width : (number + 1) * width]).astype(jnp.uint32) << number
        return jnp.pad(part_RW, ((0, 0), (0, width - part_RW.shape[1])))

    return reduce(jnp.bitwise_or, (bit(number) for number in range(-(-columns // width))))


def counts(words: UInt32[Array, "*shape"]) -> Int[Array, "*shape"]:
    """How many bits are set."""
    return jax.lax.population_count(words).astype(jnp.int32)


def total(words_RW: UInt32[Array, "R W"]) -> Int[Array, "R 1"]:
    """How many bits of each row are set."""
    return jnp.sum(counts(words_RW), axis=1, keepdims=True, dtype=jnp.int32)


def nth_bit(words: UInt32[Array, "*shape"], n: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The set bit that n set bits are below; 31 where fewer are set."""
    bit = jnp.zeros(n.shape, jnp.int32)
    for half in (16, 8, 4, 2, 1):
        low = counts((words >> bit.astype(jnp.uint32)) & jnp.uint32((1 << half) - 1))
        bit, n = jnp.where(n >= low, bit + half, bit), jnp.where(n >= low, n - low, n)
    return bit


def first_bits(words_RW: UInt32[Array, "R W"], limit_R1: Int[Array, "R 1"]) -> UInt32[Array, "R W"]:
    """The words with only the first ``limit`` set bits of each row left, word by word."""
    counts_RW = counts(words_RW)
    left_RW = jnp.clip(limit_R1 - (jnp.cumsum(counts_RW, axis=1) - counts_RW), 0)
    below_RW = (jnp.uint32(1) << nth_bit(words_RW, left_RW).astype(jnp.uint32)) - 1
    return jnp.where(left_RW >= counts_RW, words_RW, words_RW & below_RW)


def row_entries(words_RW: UInt32[Array, "R W"], k: int) -> Int[Array, "R K"]:
    """The entries of the first ``k`` set bits of each row, which has as many, word by word; W is small."""
    width, n_K = words_RW.shape[1], jnp.arange(k, dtype=jnp.int32)[None]
    ends_RW = jnp.cumsum(counts(words_RW), axis=1)
    word_RK, rank_RK = _within(ends_RW, n_K)
    return nth_bit(jnp.take_along_axis(words_RW, word_RK, axis=1), rank_RK) * width + word_RK


def entries(words_RW: UInt32[Array, "R W"], most: int) -> tuple[Int[Array, " P"], Int[Array, " P"], Bool[Array, " P"]]:
    """Rows and entries of the first ``most`` set bits, row by row, and which of these P there are.

    What is not there has row and entry 0.
    """
    flat, width = words_RW.reshape(-1), words_RW.shape[1]
    blocks_NB = jnp.pad(flat, (0, -flat.shape[0] % BLOCK)).reshape(-1, BLOCK)
    ends_NB = jnp.cumsum(counts(blocks_NB), axis=1)
    ends_N = jnp.cumsum(ends_NB[:, -1])
    starts_N, n_P = ends_N - ends_NB[:, -1], jnp.arange(most, dtype=jnp.int32)
    # An empty block starts where the next one does, which has the higher number.
    first_P = jnp.zeros(most, jnp.int32).at[starts_N].max(jnp.arange(starts_N.shape[0], dtype=jnp.int32), mode="drop")
    block_P = jax.lax.cummax(first_P)

    def found(part: tuple[Array, Array]) -> tuple[Array, Array]:
        block_P, n_P = part
        word_P1, rank_P1 = _within(ends_NB[block_P], (n_P - starts_N[block_P])[:, None])
        word_P = block_P * BLOCK + word_P1[:, 0]
        entry_P = nth_bit(flat[word_P], rank_P1[:, 0]) * width + word_P % width
        there_P = n_P < ends_N[-1]
        return jnp.where(there_P, word_P // width, 0), jnp.where(there_P, entry_P, 0)

    # In some parts, one after the other: what is not written down is found again for every use of it.
    parts = math.gcd(most, PARTS)
    found_QP = jax.lax.map(found, (block_P.reshape(parts, -1), n_P.reshape(parts, -1)))
    rows_P, entries_P = (found_P.reshape(most) for found_P in found_QP)
    return rows_P, entries_P, n_P < ends_N[-1]


def _within(ends_RW: Int[Array, "R W"], n_RK: Int[Array, "R K"]) -> tuple[Int[Array, "R K"], Int[Array, "R K"]]:
    """The word whose running counts pass n, the last one where none does, and how many are left for it."""
    last = ends_RW.shape[1] - 1
    passed = [(ends_RW[:, word : word + 1] <= n_RK).astype(jnp.int32) for word in range(last)]
    before = [jnp.where(ends_RW[:, word : word + 1] <= n_RK, ends_RW[:, word : word + 1], 0) for word in range(last)]
    zero = jnp.zeros(jnp.broadcast_shapes(ends_RW[:, :1].shape, n_RK.shape), jnp.int32)
    return sum(passed, start=zero), n_RK - reduce(jnp.maximum, before, zero)
