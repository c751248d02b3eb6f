"""Training on a store that is still being written, and on several at once."""

import threading
import time

import numpy as np
import pytest
from small_store import SmallStore, whole_store

from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats import followed_store
from saex_pipe.common.formats.checkpoint import read_sae
from saex_pipe.common.formats.followed_store import Room, freed_below
from saex_pipe.common.formats.zarr_array import Tiling
from saex_pipe.common.preemption import graceful_stop
from saex_pipe.stages.train import run as train
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.rows import first_rows, open_rows

SETTINGS = {
    "variant": "topk",
    "k": 2,
    "latents": 16,
    "batch_rows": 32,
    "rows": 1200,
    "compute_dtype": "float32",
    "tranche_shards": 2,
    "checkpoint_every_steps": 5,
}
SHAPE = {"windows": 48, "length": 32, "tiling": Tiling(8, 4), "share_kept": 0.9}  # six shards of some 230 rows


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(followed_store, "_POLL_SECONDS", 0.02)


def run(store, out, **changes):
    return train.run(Config.create({"store": store.uri, "out": str(out), "follow": True} | SETTINGS | changes))


def weights(out):
    return read_sae(str(out)).tensors


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What comes of following a store that is finished."""
    place = tmp_path_factory.mktemp("finished")
    run(whole_store(place / "store", **SHAPE), place / "sae")
    return weights(place / "sae")


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_following_a_growing_store_gives_the_sae_of_the_finished_one(tmp_path, expected):
    store = SmallStore(tmp_path / "store", **SHAPE).start()

    def write():
        for shard in (1, 0, 2, 4, 3, 5):
            time.sleep(0.2)
            store.write(shard)

    writer = threading.Thread(target=write)
    writer.start()
    run(store, tmp_path / "sae")
    writer.join()
    check_same(weights(tmp_path / "sae"), expected)


@pytest.mark.parametrize("tranche_shards", [2, None], ids=["", "half of the room unless it is set"])
def test_a_follower_frees_what_it_has_learnt_from_and_the_writer_goes_on(tmp_path, expected, tranche_shards):
    store = SmallStore(tmp_path / "store", **SHAPE).start()
    room = Room(store.folder, store.info, 4 * store.info.shard_bytes)
    most = []

    def write():
        for shard in range(6):
            while not room.has(shard):
                time.sleep(0.01)
            store.write(shard)
            most.append(sum("/c/" in name and name.startswith("acts/") for name in store.folder.list()))

    writer = threading.Thread(target=write)
    writer.start()
    run(store, tmp_path / "sae", tranche_shards=tranche_shards)
    writer.join(30)
    assert not writer.is_alive()
    assert freed_below(store.folder) == 4
    assert max(most) <= 4
    check_same(weights(tmp_path / "sae"), expected)


def test_a_sample_of_rows_waits_for_nothing_beyond_the_first_tranche(tmp_path, monkeypatch):
    """A writer without room writes no more before a step was taken, and a step needs the sample."""
    store = SmallStore(tmp_path / "store", **SHAPE).start()
    store.write(0, 1)

    def end(self, ready):
        assert ready()

    monkeypatch.setattr(followed_store.FollowedStore, "_wait_for", end)
    settings = SETTINGS | {"store": store.uri, "out": "unused", "follow": True, "sample_rows": 2000}
    with graceful_stop() as stop:
        followed, sides = open_rows(Config.create(settings), stop)
    sample = first_rows(Config.create(settings), followed, sides.taps, resumed=False)
    (rows,) = (sample[tap].shape[0] for tap in sides.taps)
    assert rows == followed.statistics(sides.taps[0]).count // 32 * 32


def test_a_follower_that_is_stopped_goes_on_where_it_was(tmp_path, expected, monkeypatch):
    store = SmallStore(tmp_path / "store", **SHAPE).start()
    Room(store.folder, store.info, 6 * store.info.shard_bytes)
    store.write(0, 1, 2)
    wait = followed_store.FollowedStore._wait_for

    def end(self, ready):
        if not ready():
            raise SystemExit(75)

    monkeypatch.setattr(followed_store.FollowedStore, "_wait_for", end)
    with pytest.raises(SystemExit):
        run(store, tmp_path / "sae")
    monkeypatch.setattr(followed_store.FollowedStore, "_wait_for", wait)
    store.write(3, 4, 5)
    run(store, tmp_path / "sae")
    assert freed_below(store.folder) == 4
    check_same(weights(tmp_path / "sae"), expected)


def test_more_rows_than_a_store_holds_that_frees_them_end_in_one_line(tmp_path):
    store = whole_store(tmp_path / "store", **SHAPE)
    Room(store.folder, store.info, 6 * store.info.shard_bytes)
    with pytest.raises(SaexError, match="shard 0 is needed, but readers have freed it"):
        run(store, tmp_path / "sae", rows=2000)


def test_a_store_that_was_not_begun_cannot_be_followed(tmp_path):
    store = SmallStore(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no finished output; run the stage that writes it first"):
        run(store, tmp_path / "sae")


def test_several_stores_train_one_sae(tmp_path):
    stores = [whole_store(tmp_path / name, first_token=n * 10_000, **SHAPE) for n, name in enumerate("ab")]
    for store, digest in zip(stores, "ab", strict=True):
        store.finish(digest)
    mixed = {"follow": False, "tranche_shards": None, "other_stores": (stores[1].uri,), "store_weights": (1.0, 3.0)}
    manifest = run(stores[0], tmp_path / "sae", **mixed)
    assert manifest.fingerprint["other_stores"] == ["b"]
    alone = {"follow": False, "tranche_shards": None}
    run(stores[0], tmp_path / "alone", **alone)
    assert not np.array_equal(weights(tmp_path / "sae")["W_dec"], weights(tmp_path / "alone")["W_dec"])
    with pytest.raises(InputError, match="holds the output of another configuration of train: other_stores"):
        run(stores[0], tmp_path / "sae", **(mixed | {"other_stores": ()}))
    with pytest.raises(InputError, match=r"train.follow and train.other_stores contradict each other"):
        run(stores[0], tmp_path / "x", **(mixed | {"follow": True}))
