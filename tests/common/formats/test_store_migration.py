"""A store of schema version 1, brought to version 2."""

import json
import re
import shutil
from typing import ClassVar

import google_crc32c
import numpy as np
import pytest
from old_store import make_old
from small_store import whole_store

from saex_pipe.common.config import StageConfig, canonical_digest, setting
from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.store_checks import check_frame, check_shards
from saex_pipe.common.formats.store_migration import Migration


class Config(StageConfig):
    stage: ClassVar[str] = "harvest"
    folder: ClassVar[str] = "activations"
    schema_version: ClassVar[int] = 2

    lately: int = setting(3, unit="", meaning="a setting that version 1 did not have")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The same store in both versions: 22 windows in 6 shards of two chunks, the last of one."""
    place = tmp_path_factory.mktemp("stores")
    whole_store(place / "new", windows=22)
    shutil.copytree(place / "new", place / "old")
    make_old(place / "old")
    return place


@pytest.fixture
def old(place, tmp_path):
    """A copy of the store of version 1, to be migrated or spoilt."""
    return shutil.copytree(place / "old", tmp_path / "store")


def migrate(path, jobs=2):
    migration = Migration.of(str(path))
    assert list(migration.bring_shards(jobs)) == list(range(6))
    return migration.finish(Config(out=str(path)))


def shard(path, number, array="acts/a"):
    return path / array / "c" / str(number) / "/".join("0" * (2 if array == "acts/a" else 1))


def contents_of(path):
    return {name: (path / name).read_bytes() for name in Folder(str(path)).list()}


def test_a_migrated_store_is_one_of_version_2_and_its_activations_are_not_written_again(place, old):
    written = {number: shard(old, number).stat().st_mtime_ns for number in range(6)}
    migrate(old)
    assert {number: shard(old, number).stat().st_mtime_ns for number in range(6)} == written
    found, expected = contents_of(old), contents_of(place / "new")
    assert found.keys() == expected.keys()
    for name in found.keys() - {"manifest.json", "started.json"}:
        same = json.loads if name.startswith("ledger/") else bytes
        assert same(found[name]) == same(expected[name]), name
    store, new = ActivationStore(str(old)), ActivationStore(str(place / "new"))
    assert store.manifest.contents == new.manifest.contents
    assert check_frame(store) == []
    assert [trouble for part in check_shards(store, 2) for trouble in part] == []
    np.testing.assert_array_equal(store.acts("a", range(22)), new.acts("a", range(22)))


def test_the_digest_is_that_of_a_store_that_the_stage_writes_today(old):
    before = json.loads((old / "manifest.json").read_text())
    manifest = migrate(old)
    assert manifest.fingerprint == before["fingerprint"] | {"schema_version": 2, "lately": 3}
    assert manifest.digest == canonical_digest(manifest.fingerprint)
    assert json.loads((old / "started.json").read_text()) == manifest.fingerprint
    assert manifest.config["lately"] == 3
    assert manifest.finished_at == before["finished_at"]


def test_outliers_are_counted_and_limits_go_on_to_a_repair(old):
    path = old / "manifest.json"
    manifest = json.loads(path.read_text())
    policy = {"special_ids": [3], "positions": [0], "norm_limits": {"a": 2.5}}
    manifest["contents"]["row_policy"] = policy
    path.write_text(json.dumps(manifest))
    migrate(old)
    store = ActivationStore(str(old))
    rows_NL = np.ones((22, 6), bool)
    rows_NL[:, 0] = False
    rows_NL[store.tokens(range(22)) == 3] = False
    outliers = (rows_NL & ~store.keep(range(22))).sum()
    assert store.manifest.contents["outlier_share"] == outliers / (outliers + store.rows)
    assert json.loads((old / "calibration.json").read_text()) == {"norm_limits": {"a": 2.5}, "channels": {}}


def test_chunks_that_lie_in_another_order_are_put_in_theirs(place, old):
    path = shard(old, 2)
    data = path.read_bytes()
    size = (len(data) - 2 * 16 - 4) // 2
    layout = ActivationStore(str(place / "new")).layouts["acts/a"]
    index = np.frombuffer(layout.index(2)[:-4], "<u8").reshape(2, 2)[:, 0].copy()
    assert list(index) == [0, size]
    turned = np.array([[size, size], [0, size]], "<u8").tobytes()
    checksum = google_crc32c.value(turned).to_bytes(4, "little")
    path.write_bytes(data[size : 2 * size] + data[:size] + turned + checksum)
    migrate(old)
    assert path.read_bytes() == data


def flip(path):
    data = bytearray(shard(path, 1).read_bytes())
    data[100] ^= 4
    shard(path, 1).write_bytes(data)


def truncate(path):
    shard(path, 2).write_bytes(shard(path, 2).read_bytes()[:-10])


def empty(path):
    shard(path, 2).write_bytes(b"")


def remove(path):
    shard(path, 3, "tokens").unlink()


def swap(path, array="acts/a"):
    one, other = shard(path, 0, array).read_bytes(), shard(path, 4, array).read_bytes()
    shard(path, 0, array).write_bytes(other)
    shard(path, 4, array).write_bytes(one)


def swap_keep(path):
    swap(path, "keep")


def lose_entry(path):
    (path / "ledger/000002.json").unlink()


def spoil_entry(path):
    (path / "ledger/000002.json").write_text('{"rows":')


def spoil_metadata(path):
    metadata = path / "keep/zarr.json"
    metadata.write_text(metadata.read_text().replace('"shape":[22,6]', '"shape":[23,6]'))


FAULTS = {
    flip: "acts/a/c/1/0/0 has a chunk that is damaged",
    truncate: "acts/a/c/2/0/0 is cut off, or its index is damaged",
    empty: "acts/a/c/2/0/0 is cut off",
    remove: "tokens/c/3/0 is missing",
    swap: "acts/a/c/0/0/0 is not what was written there",
    swap_keep: "keep, shard 0, is not what was written there",
    lose_entry: "ledger/000002.json is missing or damaged",
    spoil_entry: "ledger/000002.json is missing or damaged",
    spoil_metadata: "keep could not be created",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_store_that_is_not_as_it_was_written_stays_of_version_1(old, fault):
    fault(old)
    manifest = (old / "manifest.json").read_bytes()
    with pytest.raises(SaexError, match=re.escape(FAULTS[fault])) as error:
        migrate(old)
    assert "\n" not in str(error.value)
    assert fault is spoil_metadata or "'saex-pipe harvest --force' makes it again" in str(error.value)
    assert (old / "manifest.json").read_bytes() == manifest


class DiedError(BaseException):
    """Stands in for the end of the process."""


def test_a_migration_that_is_interrupted_anywhere_goes_on(place, tmp_path, monkeypatch):
    write, done = Folder.write, contents_of(shutil.copytree(place / "old", tmp_path / "done"))
    migrate(tmp_path / "done")
    done = contents_of(tmp_path / "done")
    for survives in range(20):
        path = shutil.copytree(place / "old", tmp_path / str(survives))
        left = [survives]

        def dying(folder, name, data, left=left):
            if left[0] == 0:
                raise DiedError
            left[0] -= 1
            write(folder, name, data)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "write", dying)
            try:
                migrate(path, jobs=1)
            except DiedError:
                assert json.loads((path / "manifest.json").read_text())["schema_version"] == 1
                patch.undo()
                migrate(path)
            else:
                break
        assert contents_of(path).keys() == done.keys()
        for name, data in contents_of(path).items():
            assert name == "manifest.json" or data == done[name], name
    else:
        pytest.fail("a migration of so small a store writes less than that")
    assert survives == 6 + 1 + 2 + 4 + 1 + 1  # entries, store.json, groups, index, started.json, manifest.json


def test_stores_of_other_versions_are_refused(place, tmp_path):
    with pytest.raises(InputError, match="is of version 2 already"):
        Migration.of(str(place / "new"))
    with pytest.raises(InputError, match="holds no finished output of harvest or toy"):
        Migration.of(str(tmp_path / "nothing"))
