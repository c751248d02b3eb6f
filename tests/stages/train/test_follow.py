"""Training on a store that is still being written, and on several at once."""

import itertools
import signal
import threading
import time

import numpy as np
import pytest
from small_store import SmallStore, whole_store

from saex_pipe.common.errors import InputError, PreemptedError, SaexError
from saex_pipe.common.formats import followed_store
from saex_pipe.common.formats.checkpoint import read_sae
from saex_pipe.common.formats.followed_store import Room, freed_below
from saex_pipe.common.formats.row_reader import RowReader
from saex_pipe.common.formats.zarr_array import Tiling
from saex_pipe.common.preemption import graceful_stop
from saex_pipe.stages.train import processes, rows
from saex_pipe.stages.train import run as train
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.learner import Learner
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
# Before every step, from more rows than are left of a tranche in its second half; latents die of the penalty.
RESAMPLING = {
    **{"resample_every_rows": 32, "resample_until_rows": 1200, "resample_from_rows": 256, "dead_after_rows": 64},
    **{"variant": "relu", "k": None, "sparsity_coefficient": 50.0, "sparsity_warmup": 0.0, "learning_rate": 0.02},
}
SHAPE = {"windows": 48, "length": 32, "tiling": Tiling(8, 4), "share_kept": 0.9}  # six shards of some 230 rows


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    wait = followed_store.FollowedStore._wait_for

    def wait_a_while(self, ready):
        deadline = time.monotonic() + 30

        def ready_in_time():
            assert time.monotonic() < deadline, "reader and writer wait for each other"
            return ready()

        wait(self, ready_in_time)

    monkeypatch.setattr(followed_store, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(followed_store.FollowedStore, "_wait_for", wait_a_while)


def run(store, out, **changes):
    return train.run(Config.create({"store": store.uri, "out": str(out), "follow": True} | SETTINGS | changes))


def weights(out):
    return read_sae(str(out)).tensors


@pytest.fixture(scope="module", params=[{}, RESAMPLING], ids=["", "resampling"])
def changes(request):
    return request.param


@pytest.fixture(scope="module")
def expected(changes, tmp_path_factory):
    """What comes of following a store that is finished."""
    place = tmp_path_factory.mktemp("finished")
    run(whole_store(place / "store", **SHAPE), place / "sae", **changes)
    return weights(place / "sae")


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_following_a_growing_store_gives_the_sae_of_the_finished_one(tmp_path, expected, changes):
    store = SmallStore(tmp_path / "store", **SHAPE).start()

    def write():
        for shard in (1, 0, 2, 4, 3, 5):
            time.sleep(0.2)
            store.write(shard)

    writer = threading.Thread(target=write)
    writer.start()
    run(store, tmp_path / "sae", **changes)
    writer.join()
    check_same(weights(tmp_path / "sae"), expected)


@pytest.mark.parametrize("tranche_shards", [2, None], ids=["", "half of the room unless it is set"])
def test_a_follower_frees_what_it_has_learnt_from_and_the_writer_goes_on(tmp_path, expected, changes, tranche_shards):
    store = SmallStore(tmp_path / "store", **SHAPE).start()
    room = Room(store.folder, store.info, 4 * store.info.shard_bytes)
    most = []

    def write():
        for shard in range(6):
            while not room.has(shard):
                time.sleep(0.01)
            store.write(shard)
            most.append(sum("/c/" in name and name.startswith("acts/") for name in store.folder.list()))

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    run(store, tmp_path / "sae", tranche_shards=tranche_shards, **changes)
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


@pytest.fixture
def stopped_where_it_waits(monkeypatch):
    """Where a run would wait for rows, SIGTERM arrives."""

    def arrived(lacking, stop):
        stop.signal = signal.SIGTERM if lacking() else None
        return stop.signal is None

    monkeypatch.setattr(rows, "arrived", arrived)


def test_a_follower_that_is_stopped_while_it_waits_goes_on_where_it_was(
    tmp_path, expected, changes, stopped_where_it_waits
):
    """With every step saved that there were rows for."""
    store, out = SmallStore(tmp_path / "store", **SHAPE).start(), tmp_path / "sae"
    Room(store.folder, store.info, 6 * store.info.shard_bytes)

    for shards, freed, read in (((0, 1, 2), 0, range(2)), ((3, 4), 2, range(4))):
        store.write(*shards)
        with pytest.raises(PreemptedError):
            run(store, out, **changes)
        assert freed_below(store.folder) == freed
        steps = len(store.kept_ids(*read)) // SETTINGS["batch_rows"]
        assert steps % SETTINGS["checkpoint_every_steps"], "or it would be saved in any case"
        assert max(int(path.name) for path in (out / "state").iterdir()) == steps
    store.write(5)
    run(store, out, **changes)
    assert freed_below(store.folder) == 4
    check_same(weights(out), expected)


def test_weights_that_have_diverged_are_not_saved_while_rows_are_awaited(tmp_path, stopped_where_it_waits, monkeypatch):
    monkeypatch.setattr(train, "_LOG_EVERY_STEPS", 1000)
    store = SmallStore(tmp_path / "store", **SHAPE).start().write(0, 1)
    step = len(store.kept_ids(0, 1)) // SETTINGS["batch_rows"]
    with pytest.raises(SaexError, match=f"at step {step}: training has diverged; there is no checkpoint yet"):
        run(store, tmp_path / "sae", learning_rate=1e30, checkpoint_every_steps=1000)
    assert not (tmp_path / "sae" / "state").exists()


def tokens_drawn_from(monkeypatch, store, out, **changes):
    """The tokens of the rows that resampling reads, by the step it comes before and the one they are of."""
    found, resample, batch = {}, Learner.resample, RowReader.batch

    def watched(self, step, reader):
        def read(reader, number, *rest):
            rows = batch(reader, number, *rest)
            found.setdefault(step, {})[number] = set(rows["a"][:, 0].astype(int))
            return rows

        with monkeypatch.context() as patch:
            patch.setattr(RowReader, "batch", read)
            resample(self, step, reader)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "resample", watched)
        run(store, out, **RESAMPLING | changes)
    return found


def test_latents_are_drawn_from_whole_batches_of_the_tranche(tmp_path, monkeypatch):
    store, more = whole_store(tmp_path / "store", **SHAPE), {"rows": 1900, "resample_until_rows": 1900}
    some = tokens_drawn_from(monkeypatch, store, tmp_path / "some", **more)
    most = tokens_drawn_from(monkeypatch, store, tmp_path / "most", resample_from_rows=1000, **more)
    tranches = [set(store.kept_ids(*shards)) for shards in [(0, 1), (2, 3), (4, 5), (0, 1)]]  # the first comes again
    assert len(set().union(*tranches)) < 1900
    ends = np.cumsum([len(tokens) for tokens in tranches])
    assert all(ends % 32), "a batch lies in two tranches"
    for tokens, end in zip(tranches, ends, strict=True):
        steps = list(range(-(-(end - len(tokens)) // 32), end // 32))
        for step in [*steps, steps[-1] + 1]:  # the last one begins in this tranche, and ends in the next
            if 0 < step < 1900 // 32:
                first = min(step, steps[-8])
                assert list(some[step]) == list(range(first, first + 8))
                assert list(most[step]) == steps
                assert all(drawn <= tokens for drawn in most[step].values())


def test_latents_are_drawn_from_the_batch_itself_where_a_tranche_holds_none(tmp_path, monkeypatch):
    store = whole_store(tmp_path / "store", **SHAPE)
    drawn = tokens_drawn_from(monkeypatch, store, tmp_path / "sae", batch_rows=400, tranche_shards=1)
    assert {step: list(steps) for step, steps in drawn.items()} == {1: [1], 2: [2]}


def test_of_a_finished_store_latents_are_drawn_from_the_batches_to_come(tmp_path, monkeypatch):
    store = whole_store(tmp_path / "store", **SHAPE)
    drawn = tokens_drawn_from(monkeypatch, store, tmp_path / "sae", follow=False, tranche_shards=None)
    assert {step: list(steps) for step, steps in drawn.items()} == {
        step: list(range(step, step + 8)) for step in range(1, 38)
    }


def test_latents_are_drawn_from_what_has_to_be_read_again_and_is_not_freed(tmp_path):
    """The pools hold a third of a tranche."""
    store, small = whole_store(tmp_path / "store", **SHAPE), RESAMPLING | {"pool_bytes": 8000}
    run(store, tmp_path / "kept", **small)
    Room(store.folder, store.info, 6 * store.info.shard_bytes)
    run(store, tmp_path / "freed", **small)
    assert freed_below(store.folder) == 4
    check_same(weights(tmp_path / "freed"), weights(tmp_path / "kept"))


def test_dead_latents_fire_again(tmp_path, monkeypatch):
    seen, resample = [], Learner.resample

    def since_fired(learner):
        return np.asarray(learner.state(0)[0].rows_since_fired_F)

    def watched(self, step, reader):
        before = since_fired(self)
        resample(self, step, reader)
        seen.append((before, since_fired(self)))

    monkeypatch.setattr(Learner, "resample", watched)
    run(whole_store(tmp_path / "store", **SHAPE), tmp_path / "sae", **RESAMPLING)
    assert all(after.max() < 64 for _, after in seen)
    fired = np.concatenate([later[before >= 64] == 0 for (before, _), (later, _) in itertools.pairwise(seen)])
    assert fired.size
    assert fired.mean() > 0.5, "of those that were dead, on the batch after"


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
