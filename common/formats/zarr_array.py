"""Sharded Zarr v3 arrays through TensorStore.

Three rules keep an array trustworthy: a shard is written whole by one process, every inner chunk carries a
crc32c, and a shard that was never written is an error when read, never zeros.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts

from saex_pipe.common.errors import SaexError
from saex_pipe.common.formats.folder import Folder, explain_storage_error

_CHUNK_BYTES = 4 << 20  # of 1, 2, 4 and 8 MiB read fastest from a cold disk (infra/bench/README.md)
_SHARD_BYTES = 64 << 20  # or a chunk more; one request each, and a failed one is repeated whole


@dataclass(frozen=True)
class Tiling:
    """How the first axis, windows, is cut: ``shard_windows`` is a multiple of ``chunk_windows``."""

    shard_windows: int
    chunk_windows: int

    @staticmethod
    def for_bytes(window_bytes: int, windows: int, shard: int | None = None, chunk: int | None = None) -> "Tiling":
        """The default cut for windows of ``window_bytes``; ``shard`` and ``chunk`` (in windows) override it."""
        if chunk is None:
            chunk = max(1, _CHUNK_BYTES // window_bytes)
            chunk = min(chunk, shard or chunk, max(windows, 1))
        if shard is None:
            shard = min(-(-_SHARD_BYTES // (window_bytes * chunk)), -(-max(windows, 1) // chunk)) * chunk
        return Tiling(-(-shard // chunk) * chunk, chunk)

    @property
    def chunks_per_shard(self) -> int:
        """Of a whole shard."""
        return self.shard_windows // self.chunk_windows

    def shards(self, windows: int) -> list[range]:
        """The windows of each shard; the last may be shorter."""
        return [range(a, min(a + self.shard_windows, windows)) for a in range(0, windows, self.shard_windows)]


def create_array(folder: Folder, name: str, *, shape: tuple[int, ...], dtype: str, tiling: Tiling, axes: str) -> Any:
    """Create array ``name``, or open it where it exists with this very metadata.

    ``axes`` names the dimensions, one letter each (``common.dims``); all but the first stay whole.
    """
    rest = list(shape[1:])
    inner: list[Any] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    if dtype == "bool":
        inner[0] = {"name": "bytes"}
    sharding = {
        "chunk_shape": [tiling.chunk_windows, *rest],
        "codecs": inner,
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    spec = {
        "driver": "zarr3",
        "kvstore": folder.kvstore_spec(name),
        "metadata": {
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [tiling.shard_windows, *rest]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": list(axes),
        },
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
    folder.make(name)  # TensorStore does not see to it that the folders it makes last
    try:
        return ts.open(spec, open=True, create=True, context=ts.Context(folder.context)).result()
    except (ValueError, OSError) as error:
        explain_storage_error(error, f"{folder.uri}/{name}", "created")


def open_array(folder: Folder, name: str, *, cache_bytes: int = 16 << 20) -> Any:
    """Open array ``name`` for reading; ``cache_bytes`` keeps shard indexes, which every chunk read needs."""
    spec = {
        "driver": "zarr3",
        "kvstore": folder.kvstore_spec(name),
        "fill_missing_data_reads": False,
        "recheck_cached_data": "open",
    }
    try:
        return ts.open(
            spec, open=True, context=ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}} | folder.context)
        ).result()
    except (ValueError, OSError) as error:
        explain_storage_error(error, f"{folder.uri}/{name}", "opened")


def create_groups(folder: Folder, names: tuple[str, ...]) -> None:
    """Write the group metadata of ``names`` ("" is the root), so that zarr-python finds the arrays below."""
    group = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}).encode()
    for name in names:
        folder.write(f"{name}/zarr.json".removeprefix("/"), group)


def write_windows(array: Any, windows: range, values: np.ndarray) -> None:
    """Write one whole shard, ``windows`` of the first axis; durable when the call returns."""
    try:
        array[windows.start : windows.stop].write(values, can_reference_source_data_indefinitely=True).result()
    except (ValueError, OSError) as error:
        explain_storage_error(error, _url(array), "written")


def read_windows(array: Any, windows: range) -> np.ndarray:
    """Read ``windows`` of the first axis; a shard that is missing or damaged is an error."""
    try:
        return np.asarray(array[windows.start : windows.stop].read().result())
    except (ValueError, OSError) as error:
        if "is missing" in str(error):
            raise SaexError(
                f"{_url(array)} lacks the shard with windows {windows.start} to {windows.stop - 1}; "
                "delete the stage's folder and run it again"
            ) from None
        explain_storage_error(error, _url(array), "read")


def _url(array: Any) -> str:
    """Where ``array`` is; TensorStore itself has no URL for S3 at an endpoint of its own."""
    place = array.kvstore.spec().to_json()
    path = str(place["path"]).rstrip("/")
    scheme = {"gcs": "gs", "s3": "s3"}.get(place["driver"])
    return path if scheme is None else f"{scheme}://{place['bucket']}/{path}"
