"""Copies of activation stores: what they hold, what they lose, and that they go on where they were stopped."""

import json
from dataclasses import replace

import numpy as np
import pytest
from small_store import SmallStore, whole_store

from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.folder import Folder
from saex_pipe.stages.copy.config import Config
from saex_pipe.stages.copy.run import run

WINDOWS = 22


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """22 windows of six tokens in six shards of two chunks, as float32."""
    return whole_store(tmp_path_factory.mktemp("store") / "source", windows=WINDOWS)


def copy(source, out, **settings):
    run(Config.create({"store": str(source), "out": str(out), **settings}))
    return ActivationStore(str(out))


def relative_error(found, source):
    """Squared distance of the rows to those of ``source``, as a share of the variance of these."""
    windows = range(found.info.windows)
    keep_NL = source.keep_NL[: len(windows)]
    exact_BD = source.acts_NLD[: len(windows)][keep_NL].astype(np.float64)
    stored_BD = found.acts("a", windows)[keep_NL].astype(np.float64)
    return np.square(stored_BD - exact_BD).sum() / np.square(exact_BD - exact_BD.mean(axis=0)).sum()


def rounding(source):
    """The most that bfloat16 loses: 2^-9 of every value."""
    exact_BD = source.acts_NLD[source.keep_NL].astype(np.float64)
    return np.square(exact_BD / 512).sum() / np.square(exact_BD - exact_BD.mean(axis=0)).sum()


def test_what_is_lost_from_float32_over_int8_to_bfloat16_is_what_each_step_loses(source, tmp_path):
    small = copy(source.uri, tmp_path / "int8", dtype="int8")
    back = copy(small.uri, tmp_path / "bfloat16", dtype="bfloat16")
    lost = relative_error(small, source)
    assert 0 < lost < 1e-4
    assert small.manifest.contents["added_error"]["a"] == pytest.approx(lost, rel=1e-3)
    assert relative_error(back, source) <= (np.sqrt(lost) + np.sqrt(rounding(source))) ** 2
    assert relative_error(copy(source.uri, tmp_path / "direct", dtype="bfloat16"), source) <= rounding(source)
    assert small.info.activation_bytes == WINDOWS * 6 * (8 + 4)


def test_a_copy_of_the_same_shape_is_the_same_to_the_byte_in_every_type(source, tmp_path):
    for dtype in ("float32", "bfloat16", "float16", "int8"):
        first = copy(source.uri, tmp_path / dtype, dtype=dtype)
        second = copy(first.uri, tmp_path / f"{dtype}-again")
        files = [
            {
                name: folder.read(name)
                for name in folder.list()
                if name.startswith(("acts", "scales", "index", "ledger"))
            }
            for folder in (Folder(first.uri), Folder(second.uri))
        ]
        assert files[0] == files[1]
        assert second.manifest.contents == first.manifest.contents


def test_rows_of_one_byte_that_are_cut_anew_lose_nothing_more(source, tmp_path):
    first = copy(source.uri, tmp_path / "first", dtype="int8")
    second = copy(first.uri, tmp_path / "second", shard_windows=6)
    for windows in first.info.tiling.shards(WINDOWS):
        for stored, again in zip(*(store.chunks("acts/a", range(0, 11)) for store in (first, second)), strict=True):
            np.testing.assert_array_equal(stored, again)
        np.testing.assert_allclose(second.acts("a", windows), first.acts("a", windows), rtol=1e-5, atol=1e-4)
    assert second.manifest.contents["added_error"] == first.manifest.contents["added_error"]


def test_a_shard_whose_ledger_entry_is_lost_is_copied_all_the_same(source, tmp_path):
    first = copy(source.uri, tmp_path / "first")
    entries = tmp_path / "first" / "ledger"
    (entries / "000001.json").unlink()
    (entries / "000002.json").write_bytes((entries / "000003.json").read_bytes())
    second = copy(first.uri, tmp_path / "second")
    assert second.manifest.contents["index"] == first.manifest.contents["index"]
    assert second.manifest.contents["statistics"] == first.manifest.contents["statistics"]


def test_a_damaged_shard_is_not_copied(source, tmp_path):
    first = copy(source.uri, tmp_path / "first")
    shard = tmp_path / "first/acts/a/c/2/0/0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(SaexError, match=r"acts/a shard 2: its index is not that of its chunks; .*repair .*/first'"):
        copy(first.uri, tmp_path / "second")
    shard.unlink()
    with pytest.raises(SaexError, match=r"acts/a shard 2: missing; 'saex-pipe store repair .*/first'"):
        copy(first.uri, tmp_path / "second")


@pytest.mark.parametrize(
    ("cut", "shards"),
    [
        ({}, [4, 4, 4, 4, 4, 2]),
        ({"shard_windows": 6}, [6, 6, 6, 4]),
        ({"shard_windows": 1}, [1] * WINDOWS),
        ({"shard_windows": 9, "chunk_windows": 3}, [9, 9, 4]),
        ({"shard_windows": 5, "chunk_windows": 2}, [6, 6, 6, 4]),  # whole chunks
        ({"shard_windows": 100, "chunk_windows": 100}, [WINDOWS]),
        ({"windows": 5}, [4, 1]),
    ],
)
def test_a_copy_holds_the_same_rows_however_it_is_cut(source, tmp_path, cut, shards):
    store = copy(source.uri, tmp_path / "copy", **cut)
    windows = range(store.info.windows)
    assert [len(part) for part in store.info.tiling.shards(len(windows))] == shards
    np.testing.assert_array_equal(store.tokens(windows), source.tokens_NL[: len(windows)])
    np.testing.assert_array_equal(store.acts("a", windows), source.acts_NLD[: len(windows)])
    np.testing.assert_array_equal(store.keep(windows), source.keep_NL[: len(windows)])
    assert store.rows == source.keep_NL[: len(windows)].sum() == store.rows_per_chunk().sum()
    exact_BD = source.acts_NLD[: len(windows)][source.keep_NL[: len(windows)]]
    np.testing.assert_allclose(store.statistics("a").mean_D, exact_BD.mean(axis=0, dtype=np.float64), rtol=1e-5)


def test_a_copy_of_some_taps_holds_these_alone(tmp_path):
    store = SmallStore(tmp_path / "source", windows=WINDOWS)
    store.info = replace(store.info, taps={"a": 8, "b": 3}, dtypes={"a": "float32", "b": "float32"})
    store.start()
    for number, windows in enumerate(store.shards):
        part = slice(windows.start, windows.stop)
        acts = {"a": store.acts_NLD[part], "b": store.acts_NLD[part, :, :3] + 1}
        entry = store.writer.write_shard(windows, store.tokens_NL[part], store.keep_NL[part], acts)
        store.folder.write(f"ledger/{number:06d}.json", json.dumps(entry).encode())
        store.ledger[number] = entry
    found = copy(store.finish().uri, tmp_path / "copy", taps=["b"])
    assert found.info.taps == {"b": 3}
    assert not (tmp_path / "copy" / "acts" / "a").exists()
    np.testing.assert_array_equal(found.acts("b", range(WINDOWS)), store.acts_NLD[..., :3] + 1)
    assert found.statistics("b").count == found.rows == store.keep_NL.sum()


def test_what_cannot_be_copied_is_refused(source, tmp_path):
    with pytest.raises(InputError, match=r"copy\.windows = 23: .* has 22"):
        copy(source.uri, tmp_path / "a", windows=23)
    with pytest.raises(InputError, match="has no tap 'b'; it holds a"):
        copy(source.uri, tmp_path / "b", taps=["b"])
    large = whole_store(tmp_path / "large", windows=4, first_token=70_000)
    with pytest.raises(SaexError, match="values that float16 cannot hold"):
        copy(large.uri, tmp_path / "c", dtype="float16")


def test_the_digest_of_a_copy_says_what_it_is_made_of(source, tmp_path):
    digests = {
        copy(source.uri, tmp_path / "same").digest,
        copy(source.uri, tmp_path / "small", dtype="bfloat16").digest,
        copy(whole_store(tmp_path / "other", windows=WINDOWS).finish("other").uri, tmp_path / "another").digest,
    }
    assert len(digests) == 3
    assert copy(source.uri, tmp_path / "again").digest in digests


class DiedError(BaseException):
    """Stands in for the end of the process."""


def test_a_copy_that_is_interrupted_anywhere_goes_on_and_ends_the_same(source, tmp_path, monkeypatch):
    settings = {"dtype": "int8", "windows": 10}
    expected = copy(source.uri, tmp_path / "whole", **settings)
    write, folder = Folder.write, Folder(expected.uri)
    names = [name for name in folder.list() if name not in ("manifest.json", "metrics.jsonl")]
    for survives in range(30):
        out = tmp_path / str(survives)
        left = [survives]

        def dying(folder, name, data, left=left):
            if left[0] == 0:
                raise DiedError
            left[0] -= 1
            write(folder, name, data)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "write", dying)
            try:
                copy(source.uri, out, **settings)
            except DiedError:
                assert not (out / "manifest.json").exists()
            else:
                break
        found = copy(source.uri, out, **settings)
        assert {name: Folder(found.uri).read(name) for name in names} == {name: folder.read(name) for name in names}
        assert found.manifest.contents == expected.manifest.contents
    else:
        pytest.fail("a copy of so small a store writes less than that")
    assert survives > 3 + 5  # more than the shards and the index


def test_a_copy_goes_on_with_the_shards_that_are_missing(source, tmp_path):
    out = tmp_path / "copy"
    copy(source.uri, out)
    (out / "manifest.json").unlink()
    (out / "ledger" / "000003.json").unlink()
    written = {n: (out / f"acts/a/c/{n}/0/0").stat().st_mtime_ns for n in range(6)}
    copy(source.uri, out)
    changed = [n for n in range(6) if (out / f"acts/a/c/{n}/0/0").stat().st_mtime_ns != written[n]]
    assert changed == [3]
    assert json.loads((out / "manifest.json").read_text())["timings"]["resumed"] == 1


def test_the_share_of_outliers_goes_on_to_every_copy(source, tmp_path):
    small = copy(source.uri, tmp_path / "small", dtype="int8")
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_bytes())
    told = {"outlier_share": 0.25, "tap_outlier_share": {"a": 0.125}}
    (tmp_path / "small" / "manifest.json").write_text(json.dumps(manifest | {"contents": manifest["contents"] | told}))
    for name, settings in {"same": {}, "other": {"dtype": "bfloat16", "windows": 10}}.items():
        contents = copy(small.uri, tmp_path / name, **settings).manifest.contents
        assert {key: contents[key] for key in told} == told
