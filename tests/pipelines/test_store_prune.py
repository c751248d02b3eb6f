"""``saex-pipe store prune``: what goes from finished, unfinished and freed stores, and what workers may still need."""

import fcntl
import json
import os
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from small_store import SmallStore, whole_store

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats import local_disk, store_debris
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.claims import Claims
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.followed_store import FollowedStore, Room, release_shards
from saex_pipe.common.formats.manifest import commit_shard
from saex_pipe.pipelines import cli

ARRAYS = ("acts/a", "keep", "tokens")
LEASE = 1.0


def prune(store, *options):
    cli.app(["store", "prune", store.uri, *options], standalone_mode=False)


def everything(folder):
    return {name: folder.read(name) for name in folder.list()}


def objects(store, shard):
    return [store.info.layouts()[array].shard_object(shard) for array in ARRAYS]


def gone(store, before):
    return sorted(set(before) - set(store.folder.list()))


@pytest.fixture
def store(tmp_path):
    """Shards 0 and 1 are finished; 2 and 3 were begun and have no ledger entry; 4 and 5 have nothing.

    Its stage takes no claims, unless a test says another.
    """
    store = SmallStore(tmp_path / "store").start().write(0, 1, 2, 3)
    store.folder.write("started.json", b'{"stage": "toy"}')
    for shard in (2, 3):
        store.folder.delete(f"ledger/{shard:06d}.json")
    return store


def test_a_finished_store_keeps_what_it_is_made_of(tmp_path, capsys):
    store = whole_store(tmp_path / "store")
    before = everything(store.folder)
    stale = {"claims/000001.json": b"{}", "acts/a/c/9/0/0": b"123", "keep/c/9/0": b"45", "readers/r.json": b"{}"}
    for name, data in stale.items():
        store.folder.write(name, data)
    prune(store)
    assert "4 objects of 9 bytes; nothing is deleted without --yes" in capsys.readouterr().out
    assert everything(store.folder) == before | stale
    prune(store, "--yes")
    assert "4 objects of 9 bytes\n" in capsys.readouterr().out
    assert everything(store.folder) == before


def test_shards_without_a_claim_go(store, capsys):
    store.folder.write("started.json", b'{"stage": "harvest"}')
    before = everything(store.folder)
    unfinished = sorted(objects(store, 2) + objects(store, 3))
    size = sum(len(before[name]) for name in unfinished)
    prune(store)
    assert f"6 objects of {size:,} bytes; nothing is deleted without --yes" in capsys.readouterr().out
    assert everything(store.folder) == before
    prune(store, "--yes")
    assert f"6 objects of {size:,} bytes\n" in capsys.readouterr().out
    assert gone(store, before) == unfinished
    store.write(2, 3, 4, 5).finish()
    np.testing.assert_array_equal(ActivationStore(store.uri).acts("a", range(24)), store.acts_NLD)


def test_shards_of_a_stage_without_claims_go_only_where_it_does_not_run(store, capsys):
    before = everything(store.folder)
    unfinished = sorted(objects(store, 2) + objects(store, 3))
    size = sum(len(before[name]) for name in unfinished)
    prune(store, "--yes")
    said = capsys.readouterr().out
    assert f"kept 6 objects of {size:,} bytes of unfinished shards and 0 of a replacement" in said
    assert "--stopped says that none runs" in said
    assert everything(store.folder) == before
    prune(store, "--stopped")
    assert f"6 objects of {size:,} bytes; nothing is deleted without --yes" in capsys.readouterr().out
    assert everything(store.folder) == before
    prune(store, "--yes", "--stopped")
    assert f"6 objects of {size:,} bytes\n" in capsys.readouterr().out
    assert gone(store, before) == unfinished
    store.write(2, 3, 4, 5).finish()
    np.testing.assert_array_equal(ActivationStore(store.uri).acts("a", range(24)), store.acts_NLD)


def test_what_a_live_claim_covers_stays_and_what_an_expired_one_covers_goes(store, capsys):
    dead = Claims(Folder(store.uri), "dead", LEASE)
    assert dead.claim(2)
    with Claims(Folder(store.uri), "alive", LEASE) as alive:
        assert alive.claim(3)
        before = store.folder.list()
        prune(store, "--yes")
        assert gone(store, before) == sorted([*objects(store, 2), "claims/000002.json"])
        said = capsys.readouterr()
        assert "kept 3 objects of" in said.out
        assert said.err == "watching 2 claims for their lease of 1 s\n"
        assert alive.confirm(3)
    assert not dead.commit(2, {})


def test_a_shard_that_its_claim_says_is_finished_stays(store):
    claims = Claims(Folder(store.uri), "w", LEASE)
    assert claims.claim(2)
    assert claims.commit(2, store.ledger[2])
    store.folder.delete("ledger/000002.json")  # as where the worker died in between
    before = store.folder.list()
    prune(store, "--yes", "--stopped")
    assert gone(store, before) == sorted(objects(store, 3))
    assert not Claims(Folder(store.uri), "next", LEASE).claim(2)
    store.write(3, 4, 5).finish()
    np.testing.assert_array_equal(ActivationStore(store.uri).acts("a", range(24)), store.acts_NLD)


@pytest.mark.parametrize("comes", ["while claims are watched", "before a claim is deleted"])
def test_a_worker_that_takes_an_expired_claim_over_meanwhile_loses_nothing(store, monkeypatch, comes):
    dead = Claims(Folder(store.uri), "dead", LEASE)
    assert dead.claim(2)
    own = Claims(Folder(store.uri), "own", 60.0)

    def come(*_):
        monkeypatch.undo()
        assert own.claim(2) or time.sleep(LEASE) or own.claim(2)  # it, too, has to watch first
        return uuid.UUID(int=1)

    if comes == "before a claim is deleted":
        monkeypatch.setattr(store_debris.uuid, "uuid4", come)
    else:
        monkeypatch.setattr(store_debris.time, "sleep", come)
    before = store.folder.list()
    prune(store, "--yes")
    assert gone(store, before) == []
    assert own.commit(2, store.ledger[2])
    store.write(3, 4, 5).finish()
    np.testing.assert_array_equal(ActivationStore(store.uri).acts("a", range(24)), store.acts_NLD)


def test_a_worker_that_claims_an_unclaimed_shard_while_others_are_watched_keeps_it(store, monkeypatch):
    store.folder.write("started.json", b'{"stage": "harvest"}')
    assert Claims(Folder(store.uri), "dead", LEASE).claim(4)
    own = Claims(Folder(store.uri), "own", 60.0)
    monkeypatch.setattr(store_debris.time, "sleep", lambda _: own.claim(2))
    before = store.folder.list()
    prune(store, "--yes")
    assert gone(store, before) == sorted([*objects(store, 3), "claims/000004.json"])
    assert own.commit(2, store.ledger[2])


def test_a_shard_that_is_finished_while_claims_are_watched_is_not_called_unfinished(store, monkeypatch, capsys):
    assert Claims(Folder(store.uri), "dead", LEASE).claim(2)
    monkeypatch.setattr(store_debris.time, "sleep", lambda _: commit_shard(store.folder, 3, store.ledger[3]))
    before = store.folder.list()
    prune(store, "--yes")
    assert gone(store, before) == sorted([*objects(store, 2), "claims/000002.json"])
    assert "kept" not in capsys.readouterr().out


def test_an_object_that_is_written_again_before_it_is_deleted_stays(store):
    debris = store_debris.find_debris(store.folder, store.info, finished=False, stopped=True, claiming=True)
    store.write(2)
    names = [piece.name for piece in store_debris.delete_debris(store.folder, debris)]
    assert sorted(names) == sorted(objects(store, 3))


def test_a_freed_store_keeps_what_followers_need_and_loses_what_they_have_freed(store, capsys):
    Room(store.folder, store.info, 2 * store.info.shard_bytes)
    release_shards(store.folder, store.info, "r", 1)
    left = objects(store, 0)[0]  # as where the reader died while it freed
    store.folder.write(left, b"12345")
    before = store.folder.list()
    prune(store, "--yes")
    assert "1 objects of 5 bytes\n" in capsys.readouterr().out
    assert gone(store, before) == [left]
    followed = FollowedStore(store.uri, lambda _: 1, lambda: None)
    assert followed.is_ready(1)
    np.testing.assert_array_equal(followed.acts("a", range(4, 8)), store.acts_NLD[4:8])
    store.write(2, 3, 4, 5).finish()
    path = Path(store.uri, "manifest.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"contents": manifest["contents"] | {"freed_below": 1}}))
    store.folder.write(left, b"12345")
    before = store.folder.list()
    prune(store, "--yes")
    assert gone(store, before) == [left, "readers/r.json"]


def test_a_lock_goes_where_no_process_holds_it(store, capsys):
    stale, held = (Path(store.uri, name).with_name("0.__lock") for name in objects(store, 0)[:2])
    for path in (stale, held):
        path.write_bytes(b"12345")
    file = os.open(held, os.O_RDWR)
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, local_disk._WHOLE_FILE)
    prune(store)
    assert stale.exists()
    prune(store, "--yes")
    assert not stale.exists()
    assert held.exists()
    os.close(file)
    prune(store, "--yes")
    assert not held.exists()
    assert capsys.readouterr().out.count("1 objects of 5 bytes") == 3


def test_a_writer_that_waits_for_a_lock_that_is_pruned_makes_another(tmp_path):
    path, lock = tmp_path / "x", tmp_path / "x.__lock"
    lock.write_bytes(b"12345")
    writers = [
        threading.Thread(target=local_disk.write_file, args=(path, [np.full(1000, n, np.uint8)])) for n in range(8)
    ]
    for writer in writers:
        writer.start()
        local_disk.stale_lock_bytes(lock, delete=True)
    for writer in writers:
        writer.join()
    assert len(set(path.read_bytes())) == 1
    assert not lock.exists()


@pytest.mark.parametrize("finished", [True, False])
def test_a_replacement_stays_unless_no_worker_runs(tmp_path, finished, capsys):
    store = whole_store(tmp_path / "store") if finished else SmallStore(tmp_path / "store").start().write(0)
    staging = SmallStore(tmp_path / ".store.saex-new").start().write(0)
    before = everything(staging.folder)
    prune(store, "--yes")
    assert f"0 bytes of unfinished shards and {len(before)} of a replacement" in capsys.readouterr().out
    assert everything(staging.folder) == before
    own = everything(store.folder)
    prune(store, "--yes", "--stopped")
    assert f"{len(before)} objects of {sum(map(len, before.values())):,} bytes" in capsys.readouterr().out
    assert everything(staging.folder) == {}
    assert everything(store.folder) == own


def test_a_store_that_is_half_replaced_is_refused(store, tmp_path):
    whole_store(tmp_path / ".store.saex-new")
    before = everything(store.folder)
    with pytest.raises(InputError, match=r"is being replaced by .*; run its stage again, which completes that"):
        prune(store, "--yes", "--stopped")
    assert everything(store.folder) == before
