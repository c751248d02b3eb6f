"""How well the reader's order mixes: rows that are neighbours in the corpus, within one batch of training."""

import numpy as np
import pytest

from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.row_reader import LANES, READ_AHEAD_FACTOR
from saex_pipe.common.formats.store_info import StoreInfo
from saex_pipe.common.formats.zarr_array import Tiling
from saex_pipe.common.shuffle import RowOrder
from saex_pipe.stages.train.rows import MOST_MATES, default_pool_bytes

WINDOWS, LENGTH, WIDTH, BATCH = 60_000, 256, 2304, 2048
STEPS = range(1000, 1240, 6)
CORRELATION = 0.2  # between the rows of one window


def store_info(windows=WINDOWS, length=LENGTH):
    tiling = Tiling.for_bytes(length * WIDTH * 2, windows)
    return StoreInfo(windows, windows, length, {"a": WIDTH}, {"a": "bfloat16"}, tiling, RowPolicy(), {})


def make_order(info, pool_bytes):
    per_chunk = info.tiling.chunk_windows * info.window_length
    chunks = -(-info.windows // info.tiling.chunk_windows)
    pool_rows = int(pool_bytes / READ_AHEAD_FACTOR / LANES / info.row_bytes("a"))
    return RowOrder(np.full(chunks, per_chunk), seed=0, pool_rows=pool_rows, lanes=LANES), per_chunk


def windows_of_batch(order, per_chunk, step):
    """Which window each row of a batch comes from."""
    found = []
    for part in order.span(step * BATCH, (step + 1) * BATCH):
        pieces = order.chunks(part.pool)
        firsts = np.cumsum([0, *(piece.last - piece.first for piece in pieces)])
        starts = np.array([piece.chunk * per_chunk + piece.first for piece in pieces])
        dealt = order.dealt(part)
        piece = np.searchsorted(firsts, dealt, side="right") - 1
        found.append((starts[piece] + dealt - firsts[piece]) // LENGTH)
    return np.concatenate(found)


def mates(windows):
    """Mean number of other rows in the batch that share a row's window."""
    counts = np.unique(windows, return_counts=True)[1]
    return (counts * (counts - 1)).sum() / len(windows)


def batches(pool_bytes, steps=STEPS):
    info = store_info()
    order, per_chunk = make_order(info, pool_bytes)
    return [windows_of_batch(order, per_chunk, step) for step in steps]


def growth_of_variance(batches):
    """By how much the variance of a batch's mean exceeds that of independent rows, from correlated values."""
    random = np.random.default_rng(0)
    of_window = random.normal(0, 1, (256, store_info().windows))
    totals = []
    for windows in batches:
        own = random.normal(0, 1, (256, len(windows)))
        values = np.sqrt(CORRELATION) * of_window[:, windows] + np.sqrt(1 - CORRELATION) * own
        totals.append(np.square(values.sum(axis=1)).mean() / len(windows))
    return np.mean(totals) - 1


def test_the_default_pool_mixes_within_its_bound():
    random = np.random.default_rng(1)
    perfect = [random.choice(store_info().windows * LENGTH, BATCH, replace=False) // LENGTH for _ in range(40)]
    found = batches(default_pool_bytes(BATCH, store_info(), ["a"]))
    assert np.mean([mates(windows) for windows in perfect]) < 0.06
    assert np.mean([mates(windows) for windows in found]) == pytest.approx(MOST_MATES, abs=0.1)
    assert growth_of_variance(perfect) == pytest.approx(0, abs=0.05)
    assert growth_of_variance(found) == pytest.approx(CORRELATION * MOST_MATES, abs=0.06)


def test_a_small_pool_mixes_worse_and_a_pool_for_the_whole_store_perfectly():
    small = batches(default_pool_bytes(BATCH, store_info(), ["a"]) // 8, STEPS[:8])
    assert np.mean([mates(windows) for windows in small]) > 5
    whole = batches(store_info().activation_bytes * 2, STEPS[:8])
    assert np.mean([mates(windows) for windows in whole]) < 0.06


def test_the_default_is_between_one_and_eight_gibibytes():
    assert default_pool_bytes(16, store_info(), ["a"]) == 1 << 30
    assert default_pool_bytes(1 << 16, store_info(length=1024), ["a"]) == 8 << 30
    assert default_pool_bytes(BATCH, store_info(), ["a"]) == BATCH * LENGTH * WIDTH * 2 * 10 // 8
