import json
import threading
import time

import numpy as np
import pytest
from small_store import STARTED, SmallStore, whole_store

from saex_pipe.common.config import canonical_digest
from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats import followed_store
from saex_pipe.common.formats.followed_store import FollowedStore, Room, freed_below, frees_shards, release_shards
from saex_pipe.common.formats.row_reader import RowReader

BATCH = 7


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(followed_store, "_POLL_SECONDS", 0.01)


def follow(uri, tranche_shards=2, check_stop=lambda: None):
    return FollowedStore(uri, lambda _: tranche_shards, check_stop)


def read(store, steps, pool_bytes=1 << 16, first=0):
    with RowReader(store, ("a",), seed=3, batch_rows=BATCH, pool_bytes=pool_bytes) as reader:
        return [reader.batch(step)["a"][:, 0].astype(int) for step in range(first, first + steps)]


def test_a_growing_store_gives_the_rows_of_a_finished_one_in_the_same_order(tmp_path):
    finished = whole_store(tmp_path / "finished")
    steps = 2 * len(finished.kept_ids()) // BATCH
    expected = read(follow(finished.uri), steps)

    growing = SmallStore(tmp_path / "growing").start()

    def write():
        for shard in (1, 0, 2, 5, 3, 4):  # not the order in which they are read
            time.sleep(0.05)
            growing.write(shard)

    writer = threading.Thread(target=write)
    writer.start()
    found = read(follow(growing.uri), steps)
    writer.join()
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(expected))


@pytest.mark.parametrize("pool_bytes", [1 << 16, 2000])
def test_every_row_of_a_tranche_comes_once_before_the_next(tmp_path, pool_bytes):
    store = whole_store(tmp_path)
    rows = np.concatenate(read(follow(store.uri), 3 * len(store.kept_ids()) // BATCH, pool_bytes))
    start = 0
    for shards in [(0, 1), (2, 3), (4, 5)] * 2:
        wanted = store.kept_ids(*shards)
        part = rows[start : start + len(wanted)].tolist()
        assert sorted(part) == wanted
        assert part != wanted
        start += len(wanted)


def test_any_step_is_found_without_the_ones_before_it(tmp_path):
    store = whole_store(tmp_path)
    np.testing.assert_array_equal(read(follow(store.uri), 12)[9], read(follow(store.uri), 1, first=9)[0])


def test_a_tranche_is_found_by_any_position_of_it(tmp_path):
    store = whole_store(tmp_path)
    sizes = [len(store.kept_ids(*shards)) for shards in [(0, 1), (2, 3), (4, 5), (0, 1)]]
    order = follow(store.uri).row_order(3, 100, 8)
    for size, stop in zip(sizes, np.cumsum(sizes).tolist(), strict=True):
        assert order.tranche_around(stop - size) == order.tranche_around(stop - 1) == range(stop - size, stop)


@pytest.mark.parametrize("pool_bytes", [1 << 16, 2000])
def test_reading_back_and_forth_in_a_tranche_needs_no_other(tmp_path, monkeypatch, pool_bytes):
    """As resampling does: the tranche before is freed, and the next one is there only for the last of the reads."""
    finished = whole_store(tmp_path / "finished")
    expected = read(follow(finished.uri), 2 * len(finished.kept_ids()) // BATCH, pool_bytes)
    store = SmallStore(tmp_path / "growing").start().write(0, 1, 2, 3)
    release_shards(store.folder, store.info, "one", 2)

    def end(self, ready):
        assert ready()

    monkeypatch.setattr(FollowedStore, "_wait_for", end)
    with RowReader(follow(store.uri), ("a",), seed=3, batch_rows=BATCH, pool_bytes=pool_bytes) as reader:
        tranche = reader.order.tranche_around(len(store.kept_ids(0, 1)))
        steps = range(-(-tranche.start // BATCH), tranche.stop // BATCH)
        for turn in range(2):
            for step in [*steps, *reversed(steps), *steps[::2], steps[-1], steps[0]]:
                np.testing.assert_array_equal(reader.batch(step)["a"][:, 0].astype(int), expected[step])
            if turn == 0:
                store.write(4, 5)
        np.testing.assert_array_equal(reader.batch(steps.stop)["a"][:, 0].astype(int), expected[steps.stop])


def test_statistics_are_of_the_first_tranche_however_much_there_is(tmp_path):
    store = SmallStore(tmp_path).start().write(0, 1)
    early = follow(store.uri).statistics("a")
    store.write(2, 3, 4, 5)
    assert early.count == len(store.kept_ids(0, 1))
    np.testing.assert_array_equal(follow(store.uri).statistics("a").sum_D, early.sum_D)


def test_the_digest_is_that_of_the_manifest_to_come(tmp_path):
    store = SmallStore(tmp_path).start().write(0)
    assert follow(store.uri).digest == canonical_digest(STARTED)


def test_waiting_ends_when_the_run_is_to_stop(tmp_path):
    store = SmallStore(tmp_path).start().write(0)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(store.uri, check_stop=stop).statistics("a")


def test_a_tap_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="no tap 'b'; it holds a"):
        follow(SmallStore(tmp_path).start().uri).require_tap("b")


def files_of(store):
    return {name for name in store.folder.list() if "/c/" in name}


def test_shards_are_freed_when_every_reader_has_got_beyond_them(tmp_path):
    store = whole_store(tmp_path)
    everything = files_of(store)
    release_shards(store.folder, store.info, "one", 0)
    release_shards(store.folder, store.info, "two", 0)
    release_shards(store.folder, store.info, "one", 4)
    assert freed_below(store.folder) == 0
    assert files_of(store) == everything
    release_shards(store.folder, store.info, "two", 2)
    assert freed_below(store.folder) == 2
    gone = {layout.shard_object(shard) for layout in store.info.layouts().values() for shard in (0, 1)}
    assert files_of(store) == everything - gone
    release_shards(store.folder, store.info, "two", 1)  # a reader that was set back changes nothing
    assert freed_below(store.folder) == 2


def test_what_readers_have_freed_is_refused_to_those_who_come_late(tmp_path):
    store = whole_store(tmp_path)
    release_shards(store.folder, store.info, "one", 2)
    with pytest.raises(SaexError, match="shard 0 is needed, but readers have freed it; harvest again"):
        read(follow(store.uri), 1)


def test_a_store_has_room_for_so_many_shards_beyond_the_freed_ones(tmp_path):
    store = SmallStore(tmp_path).start()
    assert not frees_shards(store.folder)
    room = Room(store.folder, store.info, 3 * store.info.shard_bytes + 5)
    assert frees_shards(store.folder)
    assert [room.has(shard) for shard in range(5)] == [True, True, True, False, False]
    store.folder.write("freed.json", json.dumps({"below": 1}).encode())
    assert [room.has(shard) for shard in range(5)] == [True, True, True, True, False]
    assert follow(store.uri).room_shards == 3
    Room(store.folder, store.info, 4 * store.info.shard_bytes)
    assert follow(store.uri).room_shards == 3, "what followers have begun with"
    with pytest.raises(InputError, match=r"begun with .*, which its followers may need; set it to .* or more"):
        Room(store.folder, store.info, 2 * store.info.shard_bytes)
    with pytest.raises(InputError, match=r"max_store_bytes = 1,500 does not hold two shards; raise it"):
        Room(store.folder, store.info, 1500)
