"""Everything about a finished activation store that can be wrong on disk, found."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

from saex_pipe.common.errors import SaexError
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.chunk_index import checksum_text
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.shard import ArrayLayout
from saex_pipe.common.formats.zarr_array import open_array

_ENTRIES = 1024  # of the ledger, held at once


class Trouble(NamedTuple):
    """Something that is wrong: with one shard of an array, or with the store as such (``shard`` is None)."""

    array: str
    shard: int | None
    text: str


def check_shards(store: ActivationStore, jobs: int) -> Iterator[list[Trouble]]:
    """What is wrong with each object of each shard, in order; ``jobs`` objects are read at once."""
    folder = Folder(store.uri)
    objects = (
        (layout, shard)
        for shard in range(len(store.info.tiling.shards(store.info.windows)))
        for layout in store.layouts.values()
    )
    with ThreadPoolExecutor(jobs) as pool:
        pending = (pool.submit(_check_object, folder, store, layout, shard) for layout, shard in objects)
        started: list[Future[list[Trouble]]] = list(islice(pending, 2 * jobs))
        while started:
            yield started.pop(0).result()
            started += islice(pending, 1)


def _check_object(folder: Folder, store: ActivationStore, layout: ArrayLayout, shard: int) -> list[Trouble]:
    return check_object(folder.read(layout.shard_object(shard)), store, layout, shard)


def check_object(data: bytes | None, store: ActivationStore, layout: ArrayLayout, shard: int) -> list[Trouble]:
    """What is wrong with the object of ``shard`` of an array, read as ``data``."""
    if data is None:
        return [Trouble(layout.name, shard, "missing")]
    per_shard = layout.tiling.chunks_per_shard
    checksums = store.index.checksums(layout.name)[shard * per_shard : (shard + 1) * per_shard]
    found = []
    for number, checksum in enumerate(checksums):
        chunk = shard * per_shard + number
        windows = layout.chunk_windows(chunk)
        trouble = layout.trouble(data[layout.place(chunk).bytes], int(checksum))
        if trouble is not None:
            found.append(Trouble(layout.name, shard, f"windows {windows.start} to {windows.stop - 1}: {trouble}"))
    if not found and data[len(checksums) * layout.stored_chunk_bytes :] != layout.index(len(checksums)):
        found.append(Trouble(layout.name, shard, "its index is not that of its chunks"))
    return found


def check_frame(store: ActivationStore) -> list[Trouble]:
    """What is wrong with the store beside its shards: arrays' metadata, the index, and the ledger."""
    folder, found = Folder(store.uri), []
    for layout in store.layouts.values():
        try:
            array = open_array(folder, layout.name)
        except SaexError as error:
            found.append(Trouble(layout.name, None, str(error)))
            continue
        grid = array.chunk_layout
        there = (array.shape, array.dtype.numpy_dtype, grid.write_chunk.shape, grid.read_chunk.shape)
        shard_shape = (layout.tiling.shard_windows, *layout.shape[1:])
        if there != (layout.shape, layout.dtype, shard_shape, layout.chunk_shape):
            found.append(Trouble(layout.name, None, "its zarr.json does not describe the array in the manifest"))
    for name, digest in store.manifest.contents["index"].items():
        data = folder.read(name)
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            found.append(Trouble(name, None, "missing" if data is None else "not the one in the manifest"))
    if any(trouble.array in store.manifest.contents["index"] for trouble in found):
        return found
    return found + _check_ledger(store)


def _check_ledger(store: ActivationStore) -> list[Trouble]:
    """What in the ledger and in the manifest does not fit the index, which must be there."""
    folder, found = Folder(store.uri), []
    names = [f"ledger/{shard:06d}.json" for shard in range(len(store.info.tiling.shards(store.info.windows)))]
    for start in range(0, len(names), _ENTRIES):
        entries = folder.read_many(names[start : start + _ENTRIES])
        for shard, name in enumerate(names[start : start + _ENTRIES], start):
            if name not in entries:
                found.append(Trouble("ledger", shard, "has no entry"))
            elif fitting_entry(store, shard, entries[name]) is None:
                found.append(Trouble("ledger", shard, "its entry does not fit the index"))
    rows = {store.rows, *(store.statistics(tap).count for tap in store.info.taps)}
    if rows != {int(store.rows_per_chunk().sum(dtype="int64"))}:
        found.append(Trouble("manifest.json", None, "its rows are not as many as those in the index"))
    return found


def fitting_entry(store: ActivationStore, shard: int, data: bytes) -> dict[str, Any] | None:
    """The ledger entry of ``shard`` from its bytes, None where it is damaged or not the one of the index."""
    per_shard = store.info.tiling.chunks_per_shard
    chunks = slice(shard * per_shard, (shard + 1) * per_shard)
    try:
        entry = dict(json.loads(data))
        fits = entry["rows_per_chunk"] == store.index.rows_per_chunk()[chunks].tolist() and all(
            entry["checksums"][array] == checksum_text(store.index.checksums(array)[chunks]) for array in store.layouts
        )
    except (ValueError, TypeError, KeyError):
        return None
    return entry if fits else None
