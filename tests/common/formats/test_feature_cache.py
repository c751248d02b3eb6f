"""The feature cache: what is written comes back, byte for byte the same, and one feature costs one row group."""

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats import feature_cache as fc
from saex_pipe.common.formats.folder import Folder

SOURCE = fc.CacheSource(model="tiny", tap="blocks.1.resid_pre", variant="topk", rows=1000)
LATENTS = 700  # three row groups of features, twenty-two of examples


def feature_columns(latents: int = LATENTS, seed: int = 0) -> dict[str, Any]:
    """Rows in random order, so that sorting is seen to happen."""
    rng = np.random.default_rng(seed)
    feature = rng.permutation(latents).astype(np.int32)
    count = rng.integers(0, 100, latents)
    return {
        "feature": feature,
        "firing_count": count,
        "firing_rate": (count / 1000).astype(np.float32),
        "mean_activation": rng.random(latents, np.float32),
        "max_activation": feature.astype(np.float32) + 0.5,
        "histogram": rng.integers(0, 9, (latents, 4)),
        "histogram_edges": np.tile(np.arange(5, dtype=np.float32), (latents, 1)),
        "top_output_tokens": [["a", " b"]] * latents,
        "top_output_effects": [[0.5, 0.25]] * latents,
        "bottom_output_tokens": [[]] * latents,
        "bottom_output_effects": [[]] * latents,
        "nearest_features": np.stack([feature[::-1], feature], axis=1),
        "nearest_cosines": np.full((latents, 2), 0.5, np.float32),
    }


def example_columns(features: range) -> dict[str, Any]:
    """Three examples of every even feature, highest feature first."""
    feature = np.repeat(np.array([f for f in reversed(features) if f % 2 == 0], np.int32), 3)
    rows = len(feature)
    return {
        "feature": feature,
        "stratum": ["top", "q1", "top"] * (rows // 3),
        "rank": np.tile(np.array([1, 0, 0], np.int32), rows // 3),
        "window": feature.astype(np.int64) * 10,
        "position": np.full(rows, 7, np.int32),
        "activation": feature.astype(np.float32),
        "context_start": np.full(rows, 6, np.int32),
        "context_activations": np.stack([np.zeros(rows), feature], axis=1).astype(np.float32),
        "context_tokens": [["Grüße", "\n"]] * rows,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(str(tmp_path / "cache"))
    fc.write_features(folder, feature_columns(), SOURCE)
    fc.write_examples(folder, [example_columns(range(LATENTS))])
    return folder


def test_round_trip_is_sorted_and_complete(folder: Folder) -> None:
    with fc.FeatureCache(folder) as cache:
        assert cache.source == SOURCE
        assert len(cache) == LATENTS
        table = cache.features()
        assert table.schema.equals(fc.FEATURES_SCHEMA)
        assert table.column("feature").to_pylist() == list(range(LATENTS))
        assert cache.features(["max_activation"]).column_names == ["max_activation"]
        assert cache.feature(257)["max_activation"] == 257.5
        assert cache.feature(257)["top_output_tokens"] == ["a", " b"]
        assert cache.feature(257)["bottom_output_tokens"] == []
        assert cache.feature(257)["nearest_features"][1] == 257
        examples = cache.examples(64)
        assert [(row["feature"], row["stratum"], row["rank"]) for row in examples] == [
            (64, "q1", 0),
            (64, "top", 0),
            (64, "top", 1),
        ]
        assert examples[0]["context_tokens"] == ["Grüße", "\n"]
        assert examples[0]["context_activations"] == [0.0, 64.0]
        assert cache.examples(63) == []
        everything = pa.concat_tables(cache.iter_examples(["feature", "rank"]))
        assert len(everything) == 3 * LATENTS // 2
        assert everything.column_names == ["feature", "rank"]


def test_bytes_depend_on_the_rows_alone(folder: Folder, tmp_path: Path) -> None:
    other = Folder(str(tmp_path / "other"))
    shuffled = np.random.default_rng(1).permutation(LATENTS)
    columns = {
        name: values[shuffled] if isinstance(values, np.ndarray) else values
        for name, values in feature_columns().items()
    }
    fc.write_features(other, columns, SOURCE)
    parts = [range(0, 10), range(10, 33), range(33, 34), range(34, LATENTS)]
    fc.write_examples(other, (example_columns(part) for part in parts))
    assert other.read(fc.FEATURES_FILE) == folder.read(fc.FEATURES_FILE)
    assert other.read(fc.EXAMPLES_FILE) == folder.read(fc.EXAMPLES_FILE)


def test_units_travel_in_the_file(folder: Folder) -> None:
    path = folder.local_path()
    assert path is not None
    for name, schema in ((fc.FEATURES_FILE, fc.FEATURES_SCHEMA), (fc.EXAMPLES_FILE, fc.EXAMPLES_SCHEMA)):
        stored = pq.read_schema(path / name)
        assert [field.metadata for field in stored] == [field.metadata for field in schema]
        assert all(field.metadata[b"unit"] for field in stored)
    rate = pq.read_schema(path / fc.FEATURES_FILE).field("firing_rate")
    assert rate.metadata == {b"unit": b"fraction of kept rows"}


def test_one_feature_reads_one_row_group(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    with fc.FeatureCache(folder) as cache:
        read: list[int] = []
        original = pq.ParquetFile.read_row_group

        def read_row_group(file: Any, group: int, *columns: Any) -> Any:
            read.append(group)
            return original(file, group, *columns)

        monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
        monkeypatch.setattr(pq.ParquetFile, "read", None)
        cache.feature(0)
        cache.feature(LATENTS - 1)
        cache.examples(65)
    assert read == [0, (LATENTS - 1) // fc.FEATURES_PER_GROUP, 65 // fc.FEATURES_PER_EXAMPLE_GROUP]


class RemoteFolder(Folder):
    """Stands in for an object store: reached through fsspec only."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def local_path(self) -> None:
        return None


def test_remote_files_are_read_by_ranges(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder.read(fc.EXAMPLES_FILE)
    features = folder.read(fc.FEATURES_FILE)
    assert data is not None
    assert features is not None
    store = fsspec.filesystem("memory")
    store.pipe("/feature-cache-test/examples.parquet", data)
    store.pipe("/feature-cache-test/features.parquet", features)
    fetched: list[int] = []
    memory_file = type(store.open("/feature-cache-test/examples.parquet"))
    original = memory_file.read

    def read(file: Any, size: int = -1) -> bytes:
        fetched.append(size)
        return bytes(original(file, size))

    monkeypatch.setattr(memory_file, "read", read)
    with fc.FeatureCache(RemoteFolder("memory://feature-cache-test")) as cache:
        fetched.clear()
        row = cache.examples(64)[0]
    assert row["context_activations"] == [0.0, 64.0]
    assert 0 < sum(fetched) < len(data) / 10
    with pytest.raises(InputError, match=r"memory://elsewhere/features\.parquet does not exist"):
        fc.FeatureCache(RemoteFolder("memory://elsewhere"))


def test_cache_without_any_feature(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    fc.write_features(folder, feature_columns(0), SOURCE)
    fc.write_examples(folder, [])
    with fc.FeatureCache(folder) as cache:
        assert len(cache) == 0
        assert cache.examples(0) == []
        assert len(cache.features()) == 0
        with pytest.raises(InputError, match=r"feature 0 is not in .* holds 0 features; run"):
            cache.feature(0)


@pytest.mark.parametrize("feature", [-1, LATENTS])
def test_unknown_feature_names_the_range(folder: Folder, feature: int) -> None:
    with fc.FeatureCache(folder) as cache:
        with pytest.raises(InputError, match=rf"feature {feature} is not in .* choose one from 0 to {LATENTS - 1}"):
            cache.feature(feature)
        assert cache.examples(feature) == []


@pytest.mark.parametrize("name", [fc.FEATURES_FILE, fc.EXAMPLES_FILE])
def test_unusable_files_say_what_to_do(folder: Folder, name: str) -> None:
    good = folder.read(name)
    assert good is not None
    folder.write(name, b"PK not parquet")
    with pytest.raises(InputError, match=rf"{name} is not a readable Parquet file .*; run 'saex-pipe cache' again"):
        fc.FeatureCache(folder)
    folder.write(name, good[:-100])
    with pytest.raises(InputError, match="is not a readable Parquet file"):
        fc.FeatureCache(folder)
    folder.delete(name)
    with pytest.raises(InputError, match=rf"{name} does not exist; run 'saex-pipe cache'"):
        fc.FeatureCache(folder)


def test_damage_inside_a_row_group_is_an_input_error(folder: Folder) -> None:
    data = folder.read(fc.EXAMPLES_FILE)
    assert data is not None
    folder.write(fc.EXAMPLES_FILE, data[:4] + b"\xff" * 2000 + data[2004:])
    with fc.FeatureCache(folder) as cache, pytest.raises(InputError, match="is not a readable Parquet file"):
        cache.examples(0)


def test_other_schemas_are_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder.local_path()
    assert path is not None
    pq.write_table(pa.table({"feature": [1]}), path / fc.EXAMPLES_FILE)
    with pytest.raises(InputError, match=r"examples\.parquet has schema version none, .* reads 1; run"):
        fc.FeatureCache(folder)
    monkeypatch.setattr(fc, "SCHEMA_VERSION", 2)
    with pytest.raises(InputError, match=r"features\.parquet has schema version 1, .* reads 2; run"):
        fc.FeatureCache(folder)


def test_writer_refuses_what_would_not_read_back(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "cache"))
    columns = feature_columns(4)
    with pytest.raises(ValueError, match="a feature has two rows"):
        fc.write_features(folder, columns | {"feature": np.zeros(4, np.int32)}, SOURCE)
    with pytest.raises(ValueError, match="expected"):
        fc.write_features(folder, {"feature": columns["feature"]}, SOURCE)
    with pytest.raises(ValueError, match="holds nulls"):
        fc.write_features(folder, columns | {"max_activation": [None, 1.0, 2.0, 3.0]}, SOURCE)
    with pytest.raises(ValueError, match="feature 0 follows feature 8, of an earlier part"):
        fc.write_examples(folder, [example_columns(range(10)), example_columns(range(4))])
    assert folder.list() == []
