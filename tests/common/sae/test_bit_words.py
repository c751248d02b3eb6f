"""Chosen entries as bits, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae.bit_words import (
    BLOCK,
    WORD,
    entries,
    first_bits,
    row_entries,
    words,
)

# Fewer than a word; part of the last word's bits; rows that are no whole blocks of words; several words a row.
COLUMNS = [5, WORD, 70, 33 * WORD]


def chosen(seed: int, rows: int, columns: int, share: float = 0.3) -> np.ndarray:
    random = np.random.default_rng(seed)
    chosen_RN = random.random((rows, columns)) < share
    chosen_RN[1] = False
    chosen_RN[2] = True
    return chosen_RN


def as_words(chosen_RN: np.ndarray) -> jnp.ndarray:
    return words(jnp.asarray(chosen_RN, jnp.float32), lambda part: part > 0)


def in_word_order(chosen_RN: np.ndarray) -> list[list[int]]:
    """The entries of each row that are chosen: word by word, and bit by bit."""
    width = -(-chosen_RN.shape[1] // WORD)
    return [sorted(np.flatnonzero(row), key=lambda entry: (entry % width, entry)) for row in chosen_RN]


@pytest.mark.parametrize("columns", COLUMNS)
def test_bit_i_of_word_w_is_entry_i_w_plus_w(columns: int) -> None:
    chosen_RN = chosen(0, 4, columns)
    width = -(-columns // WORD)
    expected_RW = np.zeros((4, width), np.uint32)
    for row, entry in np.argwhere(chosen_RN):
        expected_RW[row, entry % width] |= np.uint32(1) << np.uint32(entry // width)
    np.testing.assert_array_equal(as_words(chosen_RN), expected_RW)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("spare", [0, 7, -9])
def test_entries_are_those_that_are_chosen_row_by_row(columns: int, spare: int) -> None:
    chosen_RN = chosen(1, 3 * BLOCK + 1, columns)
    expected = [(row, entry) for row, found in enumerate(in_word_order(chosen_RN)) for entry in found]
    most = len(expected) + spare
    rows_P, entries_P, there_P = map(np.asarray, entries(as_words(chosen_RN), most))
    count = min(most, len(expected))
    assert list(zip(rows_P[:count], entries_P[:count], strict=True)) == expected[:count]
    assert there_P.tolist() == [True] * count + [False] * (most - count)
    assert not rows_P[count:].any()
    assert not entries_P[count:].any()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all_may_be_chosen(share: float) -> None:
    chosen_RN = np.full((3, 40), bool(share))
    rows_P, entries_P, there_P = entries(as_words(chosen_RN), 120)
    assert there_P.sum() == chosen_RN.sum()
    assert len(set(zip(np.asarray(rows_P), np.asarray(entries_P), strict=True))) == (120 if share else 1)


@pytest.mark.parametrize("columns", COLUMNS)
def test_the_first_entries_of_each_row(columns: int) -> None:
    chosen_RN = np.ones((4, columns), bool)
    chosen_RN[0, ::2] = False
    k = columns // 2
    found_RK = np.asarray(row_entries(as_words(chosen_RN), k))
    assert found_RK.tolist() == [row[:k] for row in in_word_order(chosen_RN)]


@pytest.mark.parametrize("columns", COLUMNS)
def test_of_the_bits_of_a_row_the_first_are_left(columns: int) -> None:
    chosen_RN = chosen(2, 6, columns)
    limits = np.array([0, 3, WORD, columns + 1, 1, -2])  # of row 2 one whole word
    left_RW = first_bits(as_words(chosen_RN), jnp.asarray(limits)[:, None])
    expected_RN = np.zeros_like(chosen_RN)
    for row, found in enumerate(in_word_order(chosen_RN)):
        expected_RN[row, found[: max(limits[row], 0)]] = True
    np.testing.assert_array_equal(left_RW, as_words(expected_RN))
