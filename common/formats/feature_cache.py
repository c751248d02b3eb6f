"""The feature cache: what is known about each latent of an SAE, as two Parquet files sorted by feature.

``features.parquet`` holds one row a latent (dead ones included), ``examples.parquet`` the contexts in which each
latent fires. A row group covers a fixed range of features, so that one feature costs the footer and one row group,
over a network as on disk. The bytes of a file are a function of its rows alone.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.folder import Folder

FEATURES_FILE = "features.parquet"
EXAMPLES_FILE = "examples.parquet"
SCHEMA_VERSION = 1

# Some 200 KB a row group at the default settings: one request to an object store, and a footer that stays small.
FEATURES_PER_GROUP = 256
FEATURES_PER_EXAMPLE_GROUP = 32

# The stratum of the strongest examples. The others, "q1", "q2", ..., are drawn from quantile bands of a feature's
# positive activations, "q1" the weakest.
TOP_STRATUM = "top"

_VERSION_KEY = b"saex_pipe.feature_cache.version"
_SOURCE_KEY = b"saex_pipe.feature_cache.source"


def _column(name: str, kind: pa.DataType, unit: str) -> pa.Field:
    """A column; its unit travels in the file."""
    return pa.field(name, kind, nullable=False, metadata={"unit": unit})


FEATURES_SCHEMA = pa.schema(
    [
        _column("feature", pa.int32(), "index of the latent"),
        _column("firing_count", pa.int64(), "kept rows on which the latent is positive"),
        _column("firing_rate", pa.float32(), "fraction of kept rows"),
        _column("mean_activation", pa.float32(), "activation, mean over the rows where it fires; 0 when it never does"),
        _column("max_activation", pa.float32(), "activation"),
        _column("histogram", pa.list_(pa.int64()), "kept rows in each bin of positive activation"),
        _column("histogram_edges", pa.list_(pa.float32()), "activation; one more than there are bins"),
        _column("top_output_tokens", pa.list_(pa.string()), "tokens the latent raises most; empty without a model"),
        _column("top_output_effects", pa.list_(pa.float32()), "direct effect on the logit, descending"),
        _column("bottom_output_tokens", pa.list_(pa.string()), "tokens the latent lowers most; empty without a model"),
        _column("bottom_output_effects", pa.list_(pa.float32()), "direct effect on the logit, ascending"),
        _column("nearest_features", pa.list_(pa.int32()), "latents with the most similar decoder directions"),
        _column("nearest_cosines", pa.list_(pa.float32()), "cosine of the decoder directions, descending"),
    ]
)
EXAMPLES_SCHEMA = pa.schema(
    [
        _column("feature", pa.int32(), "index of the latent"),
        _column("stratum", pa.string(), "'top', or a quantile band of the positive activations such as 'q3'"),
        _column("rank", pa.int32(), "place within feature and stratum, from 0"),
        _column("window", pa.int64(), "row of the token store"),
        _column("position", pa.int32(), "token of the window at which the example was taken"),
        _column("activation", pa.float32(), "activation at that token"),
        _column("context_start", pa.int32(), "token of the window at which the context begins"),
        _column("context_activations", pa.list_(pa.float32()), "activation of the latent on each token of the context"),
        _column("context_tokens", pa.list_(pa.string()), "text of each token of the context; empty without text"),
    ]
)

# What one call writes, by column name. A list column is a 2-D array (rows of equal length) or a sequence of sequences.
Columns = Mapping[str, np.ndarray | Sequence[Any]]


class CacheSource(NamedTuple):
    """What a cache was made from; stored in ``features.parquet``."""

    model: str  # name or URI of the language model, "" for synthetic activations
    tap: str
    variant: str  # of the SAE
    rows: int  # kept rows of activations that were counted


def write_features(folder: Folder, columns: Columns, source: CacheSource) -> int:
    """Write ``features.parquet`` whole and return its bytes.

    ``columns`` are those of FEATURES_SCHEMA, rows in any order.

    Raises ValueError when columns are missing, of unequal length or type, or a feature appears twice.
    """
    table = _table(columns, FEATURES_SCHEMA).sort_by("feature")
    if len(np.unique(table.column("feature").to_numpy())) != len(table):
        raise ValueError("a feature has two rows")
    return _write(folder, FEATURES_FILE, [table], FEATURES_PER_GROUP, {_SOURCE_KEY: json.dumps(source._asdict())})


def write_examples(folder: Folder, parts: Iterable[Columns]) -> int:
    """Write ``examples.parquet`` whole and return its bytes.

    Each part covers a higher range of features than the one before.

    Each part holds the columns of EXAMPLES_SCHEMA, rows in any order. How the rows are cut into parts leaves no trace
    in the file. Raises ValueError when columns are missing or of unequal length or type, or parts overlap.
    """
    order = [(name, "ascending") for name in ("feature", "stratum", "rank", "window", "position")]
    tables = (_table(columns, EXAMPLES_SCHEMA).sort_by(order) for columns in parts)
    return _write(folder, EXAMPLES_FILE, tables, FEATURES_PER_EXAMPLE_GROUP, {})


def _table(columns: Columns, schema: pa.Schema) -> pa.Table:
    if set(columns) != set(schema.names):
        raise ValueError(f"columns {sorted(columns)}, expected {sorted(schema.names)}")
    arrays = [_array(columns[field.name], field.type) for field in schema]
    for field, array in zip(schema, arrays, strict=True):
        if array.null_count:
            raise ValueError(f"column {field.name} holds nulls")
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, np.ndarray) and values.ndim == 2:
        offsets = np.arange(len(values) + 1, dtype=np.int32) * np.int32(values.shape[1])
        return pa.ListArray.from_arrays(offsets, pa.array(values.ravel(), kind.value_type))
    return pa.array(values, kind)


def _write(folder: Folder, name: str, tables: Iterable[pa.Table], per_group: int, metadata: dict[bytes, str]) -> int:
    schema = FEATURES_SCHEMA if name == FEATURES_FILE else EXAMPLES_SCHEMA
    schema = schema.with_metadata({_VERSION_KEY: str(SCHEMA_VERSION), **metadata})
    sink = pa.BufferOutputStream()
    # Statistics of the one column that is searched: with all of them the footer outweighs the row groups.
    with pq.ParquetWriter(sink, schema, compression="zstd", write_statistics=["feature"]) as writer:
        for group in _groups(tables, per_group):
            writer.write_table(group.replace_schema_metadata(schema.metadata), row_group_size=len(group))
    data = sink.getvalue().to_pybytes()
    folder.write(name, data)
    return len(data)


def _groups(tables: Iterable[pa.Table], per_group: int) -> Iterator[pa.Table]:
    """Regroup ``tables``, sorted by feature, into one table for each range of ``per_group`` features."""
    pending: list[pa.Table] = []
    pending_range = last = -1
    for table in tables:
        feature = table.column("feature").to_numpy()
        if not len(feature):
            continue
        if feature[0] <= last:
            raise ValueError(f"feature {feature[0]} follows feature {last}, of an earlier part")
        last = int(feature[-1])
        cuts = np.flatnonzero(np.diff(feature // per_group)) + 1
        for start, stop in pairwise([0, *cuts.tolist(), len(feature)]):
            if pending and feature[start] // per_group != pending_range:
                yield pa.concat_tables(pending).combine_chunks()
                pending = []
            pending.append(table.slice(start, stop - start))
            pending_range = feature[start] // per_group
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


class FeatureCache:
    """Reads the feature cache at ``folder``. Not safe to share between threads without a lock.

    Raises an InputError when a file is missing, is not Parquet, is damaged, or has another schema version.
    """

    def __init__(self, folder: Folder) -> None:
        self._features = _SortedFile(folder, FEATURES_FILE, FEATURES_SCHEMA)
        self._examples = _SortedFile(folder, EXAMPLES_FILE, EXAMPLES_SCHEMA)
        self.source = CacheSource(**json.loads(self._features.metadata[_SOURCE_KEY]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of latents."""
        return int(self._features.file.metadata.num_rows)

    def close(self) -> None:
        """Close both files."""
        self._features.file.close(force=True)
        self._examples.file.close(force=True)

    def features(self, columns: list[str] | None = None) -> pa.Table:
        """All latents in order, with the chosen columns of FEATURES_SCHEMA or all of them."""
        return self._features.read_all(columns)

    def feature(self, feature: int) -> dict[str, Any]:
        """The row of one latent, by column; reads one row group. InputError when there is no such latent."""
        rows = self._features.rows(feature)
        if not rows:
            raise InputError(
                f"feature {feature} is not in {self._features.uri}, which holds {len(self)} features",
                f"choose one from 0 to {len(self) - 1}" if len(self) else "run 'saex-pipe cache' again with --force",
            )
        return rows[0]

    def examples(self, feature: int) -> list[dict[str, Any]]:
        """The examples of one latent by stratum and rank, none for a dead one; reads one row group."""
        return self._examples.rows(feature)

    def iter_examples(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """All examples in order, one table a row group, no feature cut; the chosen columns of EXAMPLES_SCHEMA."""
        for group in range(self._examples.file.num_row_groups):
            yield self._examples.read_group(group, columns)


class _SortedFile:
    """One Parquet file sorted by ``feature``, of which single row groups are read."""

    def __init__(self, folder: Folder, name: str, schema: pa.Schema) -> None:
        self.uri = f"{folder.uri}/{name}"
        try:
            self.file = pq.ParquetFile(_open(folder, name), memory_map=True, pre_buffer=True)
        except FileNotFoundError:
            raise InputError(f"{self.uri} does not exist", "run 'saex-pipe cache' or point to its output") from None
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None
        self.metadata: dict[bytes, bytes] = self.file.schema_arrow.metadata or {}
        version = self.metadata.get(_VERSION_KEY, b"none").decode(errors="replace")
        if version != str(SCHEMA_VERSION) or not self.file.schema_arrow.equals(schema):
            raise InputError(
                f"{self.uri} has schema version {version}, this version of saex-pipe reads {SCHEMA_VERSION}",
                "run 'saex-pipe cache' again with --force, or install the version that wrote it",
            )
        footer = self.file.metadata
        groups = [footer.row_group(group).column(0).statistics for group in range(footer.num_row_groups)]
        self._highest = np.array([statistics.max for statistics in groups], np.int64)

    def rows(self, feature: int) -> list[dict[str, Any]]:
        group = int(np.searchsorted(self._highest, feature))
        if group == len(self._highest):
            return []
        table = self.read_group(group)
        column = table.column("feature").to_numpy()
        start, stop = np.searchsorted(column, [feature, feature + 1]).tolist()
        rows: list[dict[str, Any]] = table.slice(start, stop - start).to_pylist()
        return rows

    def read_group(self, group: int, columns: list[str] | None = None) -> pa.Table:
        try:
            return self.file.read_row_group(group, columns)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None

    def read_all(self, columns: list[str] | None) -> pa.Table:
        try:
            return self.file.read(columns)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> InputError:
        reason = (str(error).splitlines() or ["no reason given"])[0][:160]
        return InputError(
            f"{self.uri} is not a readable Parquet file ({reason})", "run 'saex-pipe cache' again with --force"
        )


def _open(folder: Folder, name: str) -> Any:
    """The local path of a file, or a random-access file that reads ranges over the network."""
    local = folder.local_path()
    if local is not None:
        return str(local / name)
    # Only object stores need fsspec and its backends, which are optional extras.
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(f"{folder.uri}/{name}")
    except ImportError as error:
        raise InputError(
            f"{folder.uri} needs an optional package: {error}", "pip install 'saex-pipe[gcs,s3]'"
        ) from None
    # Parquet asks for exact ranges, already coalesced: read-ahead would fetch the neighbours too.
    return files.open(path, "rb", cache_type="none")
