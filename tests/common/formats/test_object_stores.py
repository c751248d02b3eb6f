"""Folders and stores on S3 (moto's server) and GCS (the repository's), and what becomes of requests that fail."""

import os
import threading
from urllib.parse import unquote

import gcs_server
import numpy as np
import pytest
from gcs_server import lose_answer, reset, stall, status, times
from object_stores import fresh
from small_store import SmallStore, whole_store

from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.activations import ActivationStore, Overtaken
from saex_pipe.common.formats.claims import Claims
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.row_reader import RowReader
from saex_pipe.common.formats.zarr_array import Tiling, create_array, open_array, read_windows, write_windows


@pytest.fixture
def gcs(stores):
    """A folder on GCS, and its server without faults."""
    server = stores["servers"]["gs"]
    yield Folder(fresh(stores["gs"])), server
    server.faults.clear()


@pytest.fixture(params=["s3", "gs"])
def remote(request, stores):
    """A folder, its server without faults, and the method of an upload."""
    server = stores["servers"][request.param]
    yield Folder(fresh(stores[request.param])), server, {"s3": "PUT", "gs": "POST"}[request.param]
    server.faults.clear()


def test_objects(folder):
    assert folder.read("a") is None
    assert folder.list() == []
    folder.write("a", b"1")
    folder.write("sub/b#1 %", b"22")
    folder.write("a", b"3")
    assert folder.read("a") == b"3"
    assert folder.list() == ["a", "sub/b#1 %"]
    assert folder.list("sub/") == ["sub/b#1 %"]
    assert folder.read_many(["a", "none", "sub/b#1 %"]) == {"a": b"3", "sub/b#1 %": b"22"}
    folder.delete("sub/")
    assert folder.list() == ["a"]


def test_many_objects_are_listed_and_read(folder):
    names = [f"ledger/{n:04d}" for n in range(120)]
    for name in names:
        folder.write(name, name.encode())
    assert folder.list("ledger/") == names
    assert folder.read_many(names) == {name: name.encode() for name in names}


def test_a_conditional_write_happens_only_over_what_was_seen(folder):
    before = folder.read_stamped("a")
    assert before.data is None
    assert before.generation == folder.generation("a")
    first = folder.write_if("a", b"1", before.generation)
    assert first is not None
    assert folder.read_stamped("a") == (b"1", first)
    assert folder.write_if("a", b"2", before.generation) is None
    assert folder.read("a") == b"1"
    assert folder.write_if("a", b"3", first) is not None
    assert folder.write_if("a", b"4", first) is None
    assert folder.read("a") == b"3"


def test_a_conditional_delete_happens_only_over_what_was_seen(folder):
    folder.write("a", b"1")
    before = folder.generation("a")
    folder.write("a", b"2")
    assert not folder.delete_if("a", before)
    assert folder.read("a") == b"2"
    assert folder.delete_if("a", folder.generation("a"))
    assert folder.list() == []


def test_of_writers_that_race_one_wins(folder):
    won = []

    def race(name):
        own = Claims(Folder(folder.uri), name, 60.0)
        won.extend(shard for shard in range(10) if own.claim(shard))

    threads = [threading.Thread(target=race, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(10))


def test_arrays(folder):
    array = create_array(folder, "x", shape=(5, 3), dtype="int32", tiling=Tiling(4, 2), axes="NL")
    values = np.arange(15, dtype=np.int32).reshape(5, 3)
    write_windows(array, range(4), values[:4])
    with pytest.raises(SaexError, match=f"^{folder.uri}/x lacks the shard with windows 1 to 4"):  # and is not zeros
        read_windows(open_array(folder, "x"), range(1, 5))
    write_windows(array, range(4, 5), values[4:])
    np.testing.assert_array_equal(read_windows(open_array(folder, "x"), range(1, 5)), values[1:])


def test_a_store(folder):
    store = whole_store(folder.uri)
    found = ActivationStore(store.uri)
    np.testing.assert_array_equal(found.acts("a", range(24)), store.acts_NLD)
    with RowReader(found, ("a",), seed=0, batch_rows=20, pool_bytes=3000) as reader:
        rows = np.concatenate([reader.batch(step)["a"][:, 0] for step in range(len(store.kept_ids()) // 20)])
    assert len(set(rows.tolist())) == len(rows)
    assert {int(row) for row in rows} <= {*store.kept_ids()}


def test_a_shard_that_another_has_written_is_left_alone(folder):
    store = SmallStore(folder.uri).start()
    windows = store.shards[1]
    part = slice(windows.start, windows.stop)
    before = store.writer.versions(windows)
    store.write(1)
    arguments = windows, store.tokens_NL[part], store.keep_NL[part], {"a": store.acts_NLD[part] + 1}
    with pytest.raises(Overtaken):
        store.writer.write_shard(*arguments, over=before)
    store.write(0, 2, 3, 4, 5).finish()
    np.testing.assert_array_equal(ActivationStore(store.uri).acts("a", range(24)), store.acts_NLD)


def test_a_shard_is_one_request_an_object_and_a_chunk_is_one(remote):
    folder, server, upload = remote
    store = SmallStore(folder.uri).start()
    windows = store.shards[1]
    part = slice(windows.start, windows.stop)
    server.requests.clear()
    store.writer.write_shard(windows, store.tokens_NL[part], store.keep_NL[part], {"a": store.acts_NLD[part]})
    writes = [unquote(path) for method, path in server.requests if method == upload]
    assert len(writes) == 3
    assert [method for method, _ in server.requests if method not in (upload, "HEAD")] == []
    store.write(*range(6)).finish()
    found = ActivationStore(store.uri)
    found.rows_per_chunk()
    found.index.checksums("acts/a")
    server.requests.clear()
    list(found.chunks("acts/a", [3, 0, 5]))
    assert [method for method, _ in server.requests] == ["GET"] * 3


FAULTS = {
    "429": status(429),
    "500": status(500),
    "503": status(503),
    "reset": reset,
    "stall": stall,
    "lost answer": lose_answer,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["read", "write"])
def test_requests_that_fail_for_a_while_lose_and_double_nothing(remote, fault, kind):
    folder, server, upload = remote
    method = "GET" if kind == "read" else upload
    store = SmallStore(folder.uri).start()
    fail = times(3, FAULTS[fault], method)
    server.faults.append(fail)
    store.write(*range(6)).finish()
    found = ActivationStore(store.uri).acts("a", range(24))
    np.testing.assert_array_equal(found, store.acts_NLD)
    assert not fail(type("Handler", (), {"command": method})()), "all three faults have happened"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_claim_survives_requests_that_fail(remote, fault):
    folder, server, upload = remote
    own, other = Claims(folder, "own", 60.0), Claims(folder, "other", 60.0)
    server.faults.append(times(2, FAULTS[fault], upload))
    assert own.claim(0)
    assert not other.claim(0)
    server.faults.append(times(2, FAULTS[fault], upload))
    assert own.commit(0, {"by": "own"})
    assert not other.claim(0)
    assert folder.read("ledger/000000.json") == b'{"by": "own"}'


@pytest.mark.parametrize("fault", FAULTS)
def test_a_conditional_shard_survives_requests_that_fail(remote, fault):
    folder, server, upload = remote
    store = SmallStore(folder.uri).start()
    windows = store.shards[0]
    part = slice(windows.start, windows.stop)
    before = store.writer.versions(windows)
    server.faults.append(times(2, FAULTS[fault], upload))
    arguments = windows, store.tokens_NL[part], store.keep_NL[part], {"a": store.acts_NLD[part]}
    entry = store.writer.write_shard(*arguments, over=before)
    assert entry["windows"] == [windows.start, windows.stop]
    after = store.writer.versions(windows)
    assert all(after[name] != before[name] for name in before), "what a lost answer hid has been written"
    with pytest.raises(Overtaken):  # others come too late; the same bytes once more would be one's own lost answer
        store.writer.write_shard(*arguments[:3], {"a": -store.acts_NLD[part]}, over=before)


@pytest.mark.parametrize(
    ("fault", "kind", "line"),
    [
        (status(503), SaexError, "does not answer .*; run the same command again when it does"),
        (reset, SaexError, "does not answer"),
        (status(401), InputError, "refuses these credentials; log in"),
        (status(403), InputError, "refuses these credentials; log in"),
    ],
)
def test_what_does_not_pass_ends_in_one_line(gcs, fault, kind, line, monkeypatch):
    folder, server = gcs
    monkeypatch.setenv("SAEX_REQUEST_RETRIES", "2")
    folder = Folder(folder.uri)
    server.faults.append(times(10**6, fault))
    listing = () if kind is InputError else (folder.list, folder.delete)  # TensorStore takes 401 for an empty list
    for action in (lambda: folder.read("a"), lambda: folder.write("a", b"1"), *listing):
        with pytest.raises(kind, match=line) as caught:
            action()
        assert "\n" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_named(stores):
    with pytest.raises(InputError, match="there is no such bucket; create it"):
        Folder("s3://nowhere/run").write("a", b"1")


def test_the_environment_of_the_tests_reaches_no_real_store():
    assert os.environ.get("SAEX_S3_ENDPOINT") is None or "127.0.0.1" in os.environ["SAEX_S3_ENDPOINT"]
    assert gcs_server.GcsServer.request_queue_size > 5
