"""How well the reader's order mixes: rows that are neighbours in the corpus, within one batch of training."""

import numpy as np
import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.followed_store import FollowedStore
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.row_reader import LANES, READ_AHEAD_FACTOR
from saex_pipe.common.formats.store_info import StoreInfo
from saex_pipe.common.formats.zarr_array import Tiling
from saex_pipe.common.shuffle import RowOrder, TrancheOrder
from saex_pipe.stages.train import rows
from saex_pipe.stages.train.config import Config
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


def windows_of_batch(order, per_chunk, step, length=LENGTH):
    """Which window each row of a batch comes from."""
    found = []
    for part in order.span(step * BATCH, (step + 1) * BATCH):
        pieces = order.chunks(part.pool)
        firsts = np.cumsum([0, *(piece.last - piece.first for piece in pieces)])
        starts = np.array([piece.chunk * per_chunk + piece.first for piece in pieces])
        dealt = order.dealt(part)
        piece = np.searchsorted(firsts, dealt, side="right") - 1
        found.append((starts[piece] + dealt - firsts[piece]) // length)
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


class Following(FollowedStore):
    """A store that is followed, of which nothing but its shape is there."""

    def __init__(self, info, config, room_shards=None):
        self.info, self._room, self.rows = info, room_shards, None
        self.shards = len(info.tiling.shards(info.windows))
        self._tranche_shards = rows._tranche_shards(config, self)
        self._tranches = -(-self.shards // self._tranche_shards)

    @property
    def room_shards(self):
        return self._room

    def chunks_of(self, tranche):
        shards, size = self._shards_of(tranche), self.info.tiling.chunks_per_shard
        per_chunk = self.info.tiling.chunk_windows * self.info.window_length
        return shards.start * size, np.full(len(shards) * size, per_chunk)


def follow_config(**changes):
    settings = {"store": "s", "out": "o", "k": 1, "rows": 1, "batch_rows": BATCH, "follow": True}
    return Config.create(settings | changes)


@pytest.mark.parametrize(("length", "most"), [(64, MOST_MATES), (256, MOST_MATES), (1024, 1.45 * MOST_MATES)])
def test_a_followed_store_mixes_within_the_same_bound_and_that_of_memory(length, most):
    info, config = store_info(length=length), follow_config()
    store = Following(info, config)
    pool_rows = rows.pool_bytes(config, store, ["a"]) // ((LANES + 2) * info.row_bytes("a"))
    order = TrancheOrder(store, seed=0, pool_rows=pool_rows, lanes=LANES)
    per_chunk = info.tiling.chunk_windows * length
    steps = range(0, 3 * store.tranche_rows // BATCH, max(1, store.tranche_rows // BATCH // 16))
    found = np.mean([mates(windows_of_batch(order, per_chunk, step, length)) for step in steps])
    assert 0.8 * most < found < 1.05 * most


def test_a_tranche_is_what_is_set_and_fits_into_the_room_that_there_is():
    info = store_info()
    shard_rows = info.tiling.shard_windows * LENGTH
    wanted = Following(info, follow_config()).tranche_rows // shard_rows
    assert wanted == -(-BATCH // info.tiling.shard_windows)
    assert Following(info, follow_config(), room_shards=10).tranche_rows == 5 * shard_rows
    assert Following(info, follow_config(), room_shards=10_000).tranche_rows == wanted * shard_rows
    held = int(3.5 * shard_rows * info.row_bytes("a") * READ_AHEAD_FACTOR)
    assert Following(info, follow_config(pool_bytes=held)).tranche_rows == 3 * shard_rows
    assert Following(info, follow_config(tranche_shards=5), room_shards=10).tranche_rows == 5 * shard_rows
    small = store_info(windows=10 * info.tiling.shard_windows)
    assert Following(small, follow_config(tranche_shards=7), room_shards=10).tranche_rows == 7 * shard_rows
    with pytest.raises(InputError, match=r"tranche_shards = 6, but s holds 10 shards at a time .* set it to 5 or"):
        Following(info, follow_config(tranche_shards=6), room_shards=10)
    large = rows.pool_bytes(follow_config(), Following(info, follow_config(tranche_shards=500)), ["a"])
    assert large == 8 << 30


def test_a_small_pool_mixes_worse_and_a_pool_for_the_whole_store_perfectly():
    small = batches(default_pool_bytes(BATCH, store_info(), ["a"]) // 8, STEPS[:8])
    assert np.mean([mates(windows) for windows in small]) > 5
    whole = batches(store_info().activation_bytes * 2, STEPS[:8])
    assert np.mean([mates(windows) for windows in whole]) < 0.06


def test_the_default_is_between_one_and_eight_gibibytes():
    assert default_pool_bytes(16, store_info(), ["a"]) == 1 << 30
    assert default_pool_bytes(1 << 16, store_info(length=1024), ["a"]) == 8 << 30
    assert default_pool_bytes(BATCH, store_info(), ["a"]) == BATCH * LENGTH * WIDTH * 2 * 10 // 8
