import numpy as np
import pytest

from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.folder import Folder, explain_storage_error
from saex_pipe.common.formats.zarr_array import Tiling, create_array, open_array, read_windows, write_windows


def test_objects_are_written_read_listed_and_deleted(tmp_path):
    folder = Folder(f"file://{tmp_path}/a")
    assert folder.list() == []
    assert folder.read("x") is None
    folder.write("x", b"1")
    folder.write("sub/y", b"2")
    folder.write("sub/yy", b"")
    assert folder.list() == ["sub/y", "sub/yy", "x"]
    assert folder.list("sub/") == ["sub/y", "sub/yy"]
    assert folder.child("sub").read("y") == b"2"
    folder.delete("sub/")
    assert folder.list() == ["x"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"], "no empty folder stays"


def test_only_folders_below_the_prefix_are_removed(tmp_path):
    folder = Folder(str(tmp_path))
    for name in ("parts/a/x", "parts/b", "other/y"):
        folder.write(name, b"1")
    (tmp_path / "empty").mkdir()
    folder.delete("parts/a/")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", "empty", "other", "parts", "y"]
    folder.delete("parts/")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "other"]


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%20b", "a b", "é"])
def test_any_local_path_is_taken_as_it_is(name, tmp_path):
    folder = Folder(str(tmp_path / name))
    folder.write("x", b"1")
    array = create_array(folder, "t#1", shape=(2, 1), dtype="int32", tiling=Tiling(1, 1), axes="NL")
    write_windows(array, range(1), np.ones((1, 1), np.int32))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["t#1", "x"]
    with pytest.raises(SaexError) as caught:
        read_windows(open_array(folder, "t#1"), range(1, 2))
    assert str(caught.value).startswith(f"{tmp_path}/{name}/t#1 lacks the shard")


@pytest.mark.parametrize("text", ["No space left on device", "Disk quota exceeded", "File too large"])
def test_a_full_disk_is_bad_input(text):
    with pytest.raises(InputError):
        explain_storage_error(OSError(text), "x", "written")


def test_arrays_survive(tmp_path):
    folder = Folder(str(tmp_path))
    arrays = {"a": np.arange(5, dtype=np.int64), "b": np.float32([[1.5], [2.5]])}
    folder.write_arrays("z.npz", arrays)
    found = folder.read_arrays("z.npz")
    assert set(found) == {"a", "b"}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert folder.read_arrays("none.npz") is None


def test_unknown_schemes_are_refused():
    with pytest.raises(InputError, match="cannot be at ftp://; use a local path, gs:// or s3://"):
        Folder("ftp://x/y")


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match="a file is in its way"):
        Folder(str(tmp_path / "a")).write("x", b"1")


def test_addresses_of_object_stores(monkeypatch):
    monkeypatch.delenv("SAEX_S3_ENDPOINT", raising=False)
    assert Folder("gs://bucket/run").kvstore_spec("acts/t") == {
        "driver": "gcs",
        "bucket": "bucket",
        "path": "run/acts/t/",
    }
    assert Folder("s3://bucket").kvstore_spec() == {"driver": "s3", "bucket": "bucket", "path": ""}
    assert Folder("gs://bucket/run").local_path() is None
    monkeypatch.setenv("SAEX_S3_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    found = Folder("s3://bucket/run").kvstore_spec()
    assert (found["endpoint"], found["aws_region"]) == ("http://127.0.0.1:1", "eu-west-1")
