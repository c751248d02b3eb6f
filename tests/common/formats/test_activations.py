import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.activations import (
    DTYPES,
    SCHEMA_VERSION,
    ActivationStore,
    ActivationWriter,
    Overtaken,
    StoreInfo,
    finish_contents,
)
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.int8 import Channels
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.row_reader import RowReader
from saex_pipe.common.formats.zarr_array import Tiling

WINDOWS, LENGTH = 21, 6
TAPS = {"a": 8, "b": 3}
CHANNELS = Channels(np.array([60, *[0] * 7], np.float32), np.array([40, *[1] * 7], np.float32))


MIXED = {"a": "int8", "b": "bfloat16"}


def make_info(dtype="float32", train_windows=17):
    dtypes = MIXED if dtype == "mixed" else dict.fromkeys(TAPS, dtype)
    channels = {"a": CHANNELS} if dtype == "mixed" else {}
    return StoreInfo(WINDOWS, train_windows, LENGTH, TAPS, dtypes, Tiling(8, 2), RowPolicy(), {"model": "m"}, channels)


def make_values(dtype):
    random = np.random.Generator(np.random.Philox(key=7))
    tokens_NL = np.arange(WINDOWS * LENGTH, dtype=np.int32).reshape(WINDOWS, LENGTH)
    keep_NL = random.random((WINDOWS, LENGTH)) < 0.7
    given = DTYPES["bfloat16" if dtype == "mixed" else dtype]
    acts = {tap: random.normal(0, 1, (WINDOWS, LENGTH, width)).astype(given) for tap, width in TAPS.items()}
    # Row identity in the first coordinate, exact in every dtype.
    acts["a"][..., 0] = tokens_NL
    acts["b"][..., 0] = tokens_NL
    return tokens_NL, keep_NL, acts


def write_store(path, dtype="float32", order=None):
    """A finished store, written shard by shard in ``order``."""
    info = make_info(dtype)
    tokens_NL, keep_NL, acts = make_values(dtype)
    folder = Folder(str(path))
    writer = ActivationWriter(folder, info)
    shards = info.tiling.shards(WINDOWS)
    ledger = {}
    for shard in order or range(len(shards)):
        part = slice(shards[shard].start, shards[shard].stop)
        entry = writer.write_shard(shards[shard], tokens_NL[part], keep_NL[part], {t: v[part] for t, v in acts.items()})
        ledger[shard] = json.loads(json.dumps(entry))
    contents = finish_contents(folder, info, ledger)
    manifest = Manifest("harvest", SCHEMA_VERSION, "d", {}, {}, {}, contents, {}, {}, "")
    folder.write("manifest.json", json.dumps(manifest.__dict__).encode())
    return str(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_is_read(tmp_path, dtype):
    tokens_NL, keep_NL, acts = make_values(dtype)
    store = ActivationStore(write_store(tmp_path, dtype), ("a", "b"))
    windows = range(5, 19)
    part = slice(5, 19)
    np.testing.assert_array_equal(store.tokens(windows), tokens_NL[part])
    np.testing.assert_array_equal(store.keep(windows), keep_NL[part])
    for tap in TAPS:
        found = store.acts(tap, windows)
        assert found.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(found, acts[tap][part])


def test_taps_of_different_dtypes_lie_in_one_store(tmp_path):
    _, keep_NL, acts = make_values("mixed")
    store = ActivationStore(write_store(tmp_path, "mixed"), ("a", "b"))
    windows, part = range(5, 19), slice(5, 19)
    np.testing.assert_array_equal(store.acts("b", windows), acts["b"][part])
    exact = acts["a"].astype(np.float32)
    found = store.acts("a", windows)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, CHANNELS.decode(*CHANNELS.encode(exact))[part])
    size = sum(file.stat().st_size for file in (tmp_path / "acts" / "a" / "c").rglob("*") if file.is_file())
    assert size < 0.6 * acts["a"].size * 2 + 3 * 100, "half of bfloat16, and the checksums"
    rows_BD = exact[:17][keep_NL[:17]]
    error = np.square(CHANNELS.decode(*CHANNELS.encode(rows_BD)) - rows_BD).sum()
    variance = np.square(rows_BD - rows_BD.mean(axis=0)).sum()
    stated = store.manifest.contents["added_error"]
    assert stated.keys() == {"a"}
    assert stated["a"] == pytest.approx(error / variance, rel=1e-5)


def test_the_reader_decodes_rows_of_one_byte(tmp_path):
    store = ActivationStore(write_store(tmp_path, "mixed"), ("a", "b"))
    with RowReader(store, ("b", "a"), seed=1, batch_rows=40, pool_bytes=1 << 20) as reader:
        found = reader.batch(0)
    assert found["a"].dtype == np.float32
    assert found["b"].dtype == DTYPES["bfloat16"]
    every = store.acts("a", range(17)).reshape(-1, 8)
    ids = found["b"][:, 0].astype(int)  # below 256, exact in bfloat16
    np.testing.assert_array_equal(found["a"], every[ids])


def test_rows_are_read_into_arrays_that_are_there_and_hosts_read_their_part(tmp_path):
    store = ActivationStore(write_store(tmp_path), ("a",))
    with RowReader(store, ("a",), seed=1, batch_rows=24, pool_bytes=1 << 20) as reader:
        whole = reader.batch(1)["a"]
        out = {"a": np.zeros((24, 8), np.float32)}
        assert reader.batch(1, out=out)["a"] is out["a"]
        parts = [reader.batch(1, part)["a"] for part in (slice(0, 6), slice(6, 17), slice(17, None))]
    np.testing.assert_array_equal(out["a"], whole)
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_the_pools_keep_to_their_bytes(tmp_path):
    store = ActivationStore(write_store(tmp_path), ("a", "b"))
    for pool_bytes in (2000, 4000, 1 << 20):
        with RowReader(store, ("a", "b"), seed=1, batch_rows=5, pool_bytes=pool_bytes) as reader:
            for step in range(30):
                reader.batch(step)
                held = [room for room, _ in reader._pools.values()] + reader._free
                assert sum(array.nbytes for room in held for array in room.rows.values()) <= pool_bytes


def test_a_writer_that_was_overtaken_writes_nothing_more(tmp_path):
    info, folder = make_info(), Folder(str(tmp_path))
    tokens_NL, keep_NL, acts = make_values("float32")
    first, late = ActivationWriter(folder, info), ActivationWriter(folder, info)
    windows, part = range(8, 16), slice(8, 16)
    own = {tap: values[part] for tap, values in acts.items()}
    before = late.versions(windows)
    first.write_shard(windows, tokens_NL[part], keep_NL[part], own, over=first.versions(windows))
    names = [layout.shard_object(1) for layout in info.layouts().values()]
    there = {name: folder.read(name) for name in names}
    other = {tap: values + 1 for tap, values in own.items()}
    with pytest.raises(Overtaken):
        late.write_shard(windows, tokens_NL[part] + 1, ~keep_NL[part], other, over=before)
    assert {name: folder.read(name) for name in names} == there


def test_statistics_and_counts_are_of_kept_training_rows_only(tmp_path):
    _, keep_NL, acts = make_values("float32")
    store = ActivationStore(write_store(tmp_path, order=[2, 0, 1]))
    rows_BD = acts["a"][:17][keep_NL[:17]].astype(np.float64)
    assert store.rows == len(rows_BD)
    assert store.statistics("a").count == len(rows_BD)
    np.testing.assert_allclose(store.statistics("a").mean_D, rows_BD.mean(axis=0), rtol=1e-6)
    expected = [int(keep_NL[a : min(a + 2, 17)].sum()) for a in range(0, 17, 2)]
    assert store.rows_per_chunk().tolist() == expected + [0] * (11 - len(expected))


def test_the_order_of_writing_leaves_no_trace(tmp_path):
    for name, order in (("a", [0, 1, 2]), ("b", [2, 1, 0])):
        write_store(tmp_path / name, order=order)
    names = Folder(str(tmp_path / "a")).list()
    assert len(names) > 10
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_zarr_python_opens_a_store(tmp_path):
    dtypes = ("float32", "bfloat16")
    places = [write_store(tmp_path / dtype, dtype) for dtype in dtypes]
    script = """
import sys, numpy, zarr
for number, place in enumerate(sys.argv[2:]):
    group = (zarr.open_group, zarr.open)[number](place, mode="r")
    acts = group["acts/a"][3:10]
    numpy.savez(f"{sys.argv[1]}/{number}.npz", acts=acts.astype("f4"), keep=group["keep"][:], dtype=str(acts.dtype))
assert "saex_pipe.common.formats.activations" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, tmp_path, *places], check=True)  # where nobody has imported saex_pipe
    for number, dtype in enumerate(dtypes):
        _, keep_NL, acts = make_values(dtype)
        found = np.load(tmp_path / f"{number}.npz")
        assert found["dtype"] == dtype
        np.testing.assert_array_equal(found["acts"], acts["a"][3:10].astype(np.float32))
        np.testing.assert_array_equal(found["keep"], keep_NL)


def shard_file(path, shard):
    return path / "acts" / "a" / "c" / str(shard) / "0" / "0"


def test_a_missing_shard_is_an_error_and_never_zeros(tmp_path):
    store = ActivationStore(write_store(tmp_path), ("a",))
    shard_file(tmp_path, 1).unlink()
    np.testing.assert_array_equal(store.acts("a", range(0, 8)), make_values("float32")[2]["a"][:8])
    with pytest.raises(SaexError, match="lacks the shard with windows 8 to 9"):
        store.acts("a", range(8, 10))


def flipped(data, _):
    data[100] ^= 1
    return data


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (flipped, "damaged: its checksum does not fit"),
        (lambda data, _: data[:500], "windows 2 to 3: cut off before the end of its 388 bytes"),
        (lambda data, _: b"", "windows 0 to 1: cut off"),
        (lambda _, path: shard_file(path, 1).read_bytes(), "not what was written there"),
    ],
    ids=["flipped bit", "truncated", "empty", "swapped"],
)
def test_a_damaged_shard_is_an_error(tmp_path, damage, line):
    uri = write_store(tmp_path)
    file = shard_file(tmp_path, 0)
    file.write_bytes(damage(bytearray(file.read_bytes()), tmp_path))
    with pytest.raises(SaexError, match=line):
        ActivationStore(uri, ("a",)).acts("a", range(0, 4))


def test_an_unknown_tap_is_named_with_those_there_are(tmp_path):
    with pytest.raises(InputError, match="no tap 'c'; it holds a, b"):
        ActivationStore(write_store(tmp_path), ("c",))


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path):
    info = make_info("float16")
    tokens_NL, _, acts = make_values("float32")
    writer = ActivationWriter(Folder(str(tmp_path)), info)
    acts["a"][0, 0, 1] = 1e6
    with np.errstate(over="ignore"):
        halves = {tap: values[:8].astype(np.float16) for tap, values in acts.items()}
    with pytest.raises(SaexError, match="float16 cannot hold"):
        writer.write_shard(range(0, 8), tokens_NL[:8], np.ones((8, LENGTH), bool), halves)


@pytest.mark.parametrize(("dtype", "pool_bytes"), [("float32", 1 << 20), ("bfloat16", 1500)])
def test_the_reader_gives_every_kept_training_row_once_an_epoch(tmp_path, dtype, pool_bytes):
    tokens_NL, keep_NL, acts = make_values(dtype)
    store = ActivationStore(write_store(tmp_path, dtype), ("a", "b"))
    expected = sorted(tokens_NL[:17][keep_NL[:17]].tolist())
    batch_rows = 5
    steps = len(expected) // batch_rows
    with RowReader(store, ("a", "b"), seed=1, batch_rows=batch_rows, pool_bytes=pool_bytes) as reader:
        batches = [reader.batch(step) for step in range(steps + 1)]
        again = reader.batch(3)
    rows = {tap: np.concatenate([batch[tap] for batch in batches])[: len(expected)] for tap in TAPS}
    ids = rows["a"][:, 0].astype(np.int32)
    assert sorted(ids.tolist()) == expected
    np.testing.assert_array_equal(rows["a"], acts["a"].reshape(-1, 8)[ids])
    np.testing.assert_array_equal(rows["b"], acts["b"].reshape(-1, 3)[ids])
    np.testing.assert_array_equal(again["a"], batches[3]["a"])


def test_a_store_smaller_than_a_batch_is_refused(tmp_path):
    store = ActivationStore(write_store(tmp_path), ("a",))
    with pytest.raises(InputError, match="fewer than one batch of 1,000"):
        RowReader(store, ("a",), seed=0, batch_rows=1000, pool_bytes=1 << 20)


def test_the_default_tiling_has_chunks_of_four_megabytes_and_shards_of_64():
    tiling = Tiling.for_bytes(window_bytes=128 * 576 * 2, windows=100_000)
    assert 4e6 < tiling.chunk_windows * 128 * 576 * 2 <= 4 << 20
    assert 64e6 < tiling.shard_windows * 128 * 576 * 2 <= 68 << 20
    assert tiling.shard_windows % tiling.chunk_windows == 0
    assert Tiling.for_bytes(window_bytes=1 << 30, windows=5) == Tiling(1, 1)
    assert Tiling.for_bytes(window_bytes=25_000_000, windows=50) == Tiling(3, 1), "not under 64 MB"
    assert Tiling.for_bytes(window_bytes=100, windows=5) == Tiling(5, 5)
    assert Tiling.for_bytes(window_bytes=100, windows=5, shard=3, chunk=2) == Tiling(4, 2)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.2), ("int8", 0.8)])
def test_writing_a_shard_takes_little_memory_beside_it(tmp_path, dtype, most):
    windows, length, width = 64, 64, 1024
    channels = {"a": Channels(np.zeros(width, np.float32), np.ones(width, np.float32))} if dtype == "int8" else {}
    tiling = Tiling(windows, 4)
    info = StoreInfo(
        windows, windows, length, {"a": width}, {"a": dtype}, tiling, RowPolicy(), {"model": "m"}, channels
    )
    writer, shard = ActivationWriter(Folder(str(tmp_path)), info), range(windows)
    acts_NLD = np.random.default_rng(0).normal(size=(windows, length, width)).astype(DTYPES["bfloat16"])
    tokens_NL, keep_NL = np.zeros((windows, length), np.int32), np.ones((windows, length), bool)
    over = writer.versions(shard)
    tracemalloc.start()
    try:
        writer.write_shard(shard, tokens_NL, keep_NL, {"a": acts_NLD}, over=over)
        assert tracemalloc.get_traced_memory()[1] < most * acts_NLD.nbytes
    finally:
        tracemalloc.stop()
