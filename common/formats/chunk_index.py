"""What is known of every chunk of a finished store: its training rows, and the checksum of each of its arrays.

``index/rows.npy``           int32  [chunks]
``index/crc32c/<array>.npy`` uint32 [chunks]

Objects of their own, named in the manifest with their digests, so that a store of a billion rows opens without them
and plans its order from the first alone.
"""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt32

from saex_pipe.common.errors import SaexError
from saex_pipe.common.formats.folder import Folder

_ROWS = "index/rows.npy"


def checksum_text(checksums: UInt32[np.ndarray, " chunks"]) -> str:
    """For a ledger entry: little-endian, in base64."""
    return base64.b64encode(checksums.astype("<u4").tobytes()).decode()


def checksums_from_text(text: str) -> UInt32[np.ndarray, " chunks"]:
    """Inverse of ``checksum_text``."""
    return np.frombuffer(base64.b64decode(text), "<u4").astype(np.uint32)


def write_chunk_index(folder: Folder, entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Write the index of a store from the ledger entries of all its shards, in order.

    Returns:
        sha256 of each object, by its name.
    """
    rows_per_chunk = np.concatenate([np.asarray(entry["rows_per_chunk"], np.int32) for entry in entries])
    checksums = {
        array: np.concatenate([checksums_from_text(entry["checksums"][array]) for entry in entries])
        for array in entries[0]["checksums"]
    }
    return write_index_objects(folder, rows_per_chunk, checksums)


def write_index_objects(
    folder: Folder, rows_per_chunk: Int32[np.ndarray, " chunks"], checksums: Mapping[str, UInt32[np.ndarray, " chunks"]]
) -> dict[str, str]:
    """Write the index itself; see ``write_chunk_index``."""
    digests = {}
    for name, values in {_ROWS: rows_per_chunk, **{_checksums(array): v for array, v in checksums.items()}}.items():
        buffer = io.BytesIO()
        np.save(buffer, values, allow_pickle=False)
        folder.write(name, buffer.getvalue())
        digests[name] = hashlib.sha256(buffer.getvalue()).hexdigest()
    return digests


class ChunkIndex:
    """The index of a finished store, each object read when it is first asked for."""

    def __init__(self, folder: Folder, digests: Mapping[str, str]) -> None:
        self._folder = folder
        self._digests = dict(digests)
        self._loaded = lru_cache(maxsize=None)(self._load)

    def rows_per_chunk(self) -> Int32[np.ndarray, " chunks"]:
        """Training rows of each chunk of windows."""
        return self._loaded(_ROWS)

    def checksums(self, array: str) -> UInt32[np.ndarray, " chunks"]:
        """crc32c of each chunk of ``array``."""
        return self._loaded(_checksums(array))

    def _load(self, name: str) -> np.ndarray:
        data = self._folder.read(name)
        if data is None or hashlib.sha256(data).hexdigest() != self._digests.get(name):
            trouble = "is missing" if data is None else "is not the one in the manifest"
            raise SaexError(f"{self._folder.uri}/{name} {trouble}; 'saex-pipe store repair' makes it again")
        values: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
        return values


def _checksums(array: str) -> str:
    return f"index/crc32c/{array}.npy"
