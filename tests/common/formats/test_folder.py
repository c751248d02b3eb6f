import numpy as np
import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.folder import Folder


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


def test_object_store_addresses_stay_as_they_are():
    assert Folder("gs://bucket/run").kvstore_spec("acts/t") == "gs://bucket/run/acts/t/"
    assert Folder("gs://bucket/run").local_path() is None
