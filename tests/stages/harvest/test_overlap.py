"""Work under way ahead of its results, the clock of the device's waits, and the queue of passes."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from saex_pipe.stages.harvest import overlap
from saex_pipe.stages.harvest.forward import Harvested, pieces
from saex_pipe.stages.harvest.overlap import DeviceClock, Passes, ahead
from saex_pipe.stages.harvest.shard import Shard, copy_rows


def finished(value):
    future = Future()
    future.set_result(value)
    return future


@pytest.mark.parametrize("number", [0, 1, 3, 20])
def test_later_work_is_begun_before_a_result_is_used_but_not_more_of_it(number):
    begun = []
    work = (begun.append(i) or finished(i) for i in range(10))
    for i, result in enumerate(ahead(work, number)):
        assert result == i
        assert begun == list(range(min(10, i + 1 + number)))
    assert i == 9


def test_a_failure_is_raised_where_its_result_is_due():
    with ThreadPoolExecutor(2) as threads:
        results = ahead((threads.submit(divmod, 6, 2 - i) for i in range(4)), 2)
        assert [next(results), next(results)] == [(3, 0), (6, 0)]
        with pytest.raises(ZeroDivisionError):
            next(results)


class Hand:
    """A hand of a clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(overlap, "time", SimpleNamespace(monotonic=lambda: self.now))

    def __call__(self, seconds):
        self.now += seconds


def test_the_device_waits_while_nothing_is_queued_or_running(monkeypatch):
    passes = Hand(monkeypatch)
    clock = DeviceClock()
    passes(2)  # reading the first tokens
    clock.begin_pass()
    passes(10)
    clock.begin_pass()  # queued behind the first
    passes(1)
    clock.end_pass()
    passes(4)  # the second runs
    assert clock.read() == (2, 17)
    clock.end_pass()
    passes(3)
    assert clock.read() == (5, 20), "a wait that goes on counts too"
    clock.begin_pass()
    passes(7)
    clock.end_pass()
    passes(1)  # writing the last shard
    assert clock.read() == (6, 28)


class Pending:
    """Stands for an array that the device has yet to compute."""

    def __init__(self, value):
        self.value, self.computed = value, threading.Event()

    def block_until_ready(self):
        assert self.computed.wait(20), "the pass was fetched before it was computed"

    @property
    def addressable_shards(self):
        return [SimpleNamespace(replica_id=0, index=(slice(0, 2),), data=self.value)]


def a_shard(windows=6, length=3, width=2):
    acts = {"tap": np.zeros((windows, length, width), np.float32)}
    tokens_NL = np.arange(windows * length, dtype=np.int32).reshape(windows, length)
    return Shard(0, range(windows), tokens_NL, tokens_NL < 0, acts, {"tap": np.zeros((windows, length), np.float32)})


def test_passes_are_queued_before_earlier_ones_are_computed():
    queued = []

    def forward(tokens_NL):
        acts_NLD = np.repeat(tokens_NL[..., None], 2, axis=-1).astype(np.float32)
        queued.append(Harvested({"tap": Pending(acts_NLD)}, {"tap": Pending(acts_NLD[..., 0])}))
        return queued[-1]

    shard = a_shard()
    with Passes(forward) as passes:
        futures = [passes.submit(batch) for batch in shard.batches(2)]
        assert len(queued) == 3
        for number, (harvested, future) in enumerate(zip(queued, futures, strict=True)):
            assert not any(later.done() for later in futures[number:])
            for pending in jax.tree.leaves(harvested):
                pending.computed.set()
            assert future.result(20).completes_shard == (number == 2)
    np.testing.assert_array_equal(shard.acts["tap"][..., 1], shard.tokens_NL)
    np.testing.assert_array_equal(shard.norms["tap"], shard.tokens_NL)


@pytest.mark.parametrize(("windows", "batch", "sizes"), [(6, 4, [4, 2]), (6, 6, [6]), (6, 9, [6]), (1, 2, [1])])
def test_batches_cover_a_shard_once(windows, batch, sizes):
    shard = a_shard(windows)
    batches = list(shard.batches(batch))
    assert [len(batch.tokens_NL) for batch in batches] == sizes
    np.testing.assert_array_equal(np.concatenate([batch.tokens_NL for batch in batches]), shard.tokens_NL)
    assert [batch.completes_shard for batch in batches] == [False] * (len(sizes) - 1) + [True]
    assert sum(batch.bytes for batch in batches) == shard.acts["tap"].nbytes


@pytest.mark.parametrize("rows", range(1, 9))
def test_rows_are_copied_from_the_devices_that_hold_them_without_the_padding(rows):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
    target = np.full((rows + 1, 3), -1, np.float32)
    array = jax.device_put(whole, sharding)
    copy_rows(array, target[:rows])
    assert len(pieces(array)) == 4, "each row once"
    np.testing.assert_array_equal(target[:rows], whole[:rows])
    assert (target[rows] == -1).all()
