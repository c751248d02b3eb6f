"""The shards of a Zarr v3 array as bytes: the codec ``sharding_indexed`` over ``bytes`` and ``crc32c``.

Shards are only ever written whole, so they are put together here: one pass gives the object and the checksum of
every chunk, which the ledger keeps, and the object can be written on a condition. TensorStore and zarr-python read
them as any other. Chunks lie in order from the start of the shard, each followed by its checksum, then the index;
so a chunk is one request for a known range, and a chunk of another place, which checks itself, is still found out.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import google_crc32c
import numpy as np
from jaxtyping import Shaped, UInt8, UInt32

from saex_pipe.common.errors import SaexError
from saex_pipe.common.formats.zarr_array import Tiling

CHECKSUM_BYTES = 4
_INDEX_ENTRY = np.dtype([("offset", "<u8"), ("size", "<u8")])
_ABSENT = (1 << 64) - 1
_RESIDUE = 0x48674BC7  # crc32c of any bytes followed by their own crc32c


class EncodedShard(NamedTuple):
    """One object, as pieces that follow one another, and the crc32c of each of its chunks.

    The pieces are views of the values it was made of where those lie in one piece of memory.
    """

    pieces: list[UInt8[np.ndarray, " bytes"]]
    checksums: UInt32[np.ndarray, " chunks"]


class ChunkPlace(NamedTuple):
    """Where the bytes of a chunk with its checksum lie."""

    object: str  # under the root of the store
    bytes: slice


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a store: first axis windows, cut by ``tiling``; the others whole."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    tiling: Tiling

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Of a whole chunk; the last one of the array is filled up with zeros to it."""
        return (self.tiling.chunk_windows, *self.shape[1:])

    @property
    def chunk_bytes(self) -> int:
        """Of a chunk without its checksum."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    def shard_object(self, shard: int) -> str:
        """Name of the object that holds ``shard``, under the root of the store."""
        return f"{self.name}/c/{shard}{'/0' * (len(self.shape) - 1)}"

    def chunk_windows(self, chunk: int) -> range:
        """The windows of ``chunk``."""
        size = self.tiling.chunk_windows
        return range(chunk * size, min((chunk + 1) * size, self.shape[0]))

    @property
    def stored_chunk_bytes(self) -> int:
        """Of a chunk with its checksum."""
        return self.chunk_bytes + CHECKSUM_BYTES

    def index(self, chunks: int) -> bytes:
        """The end of a shard with so many chunks: where each one lies, and the checksum of that."""
        index = np.full(self.tiling.chunks_per_shard, np.array((_ABSENT, _ABSENT), _INDEX_ENTRY))
        index["offset"][:chunks] = np.arange(chunks) * self.stored_chunk_bytes
        index["size"][:chunks] = self.stored_chunk_bytes
        found = index.tobytes()
        return found + np.array(google_crc32c.value(found), "<u4").tobytes()

    def place(self, chunk: int) -> ChunkPlace:
        """Where ``chunk`` lies."""
        shard, number = divmod(chunk, self.tiling.chunks_per_shard)
        size = self.stored_chunk_bytes
        return ChunkPlace(self.shard_object(shard), slice(number * size, (number + 1) * size))

    def encode(self, values: Shaped[np.ndarray, "windows ..."]) -> EncodedShard:
        """The object of one shard whose windows are ``values``."""
        size = self.chunk_bytes
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        pieces, checksums = [], []
        for start in range(0, len(flat), size):
            body = flat[start : start + size]
            if len(body) < size:
                body = np.concatenate([body, np.zeros(size - len(body), np.uint8)])
            checksums.append(google_crc32c.value(body))
            pieces += [body, np.array(checksums[-1:], "<u4").view(np.uint8)]
        pieces.append(np.frombuffer(self.index(len(checksums)), np.uint8))
        return EncodedShard(pieces, np.array(checksums, np.uint32))

    def decode(
        self, chunk: int, data: bytes | UInt8[np.ndarray, " bytes"], checksum: int, uri: str
    ) -> Shaped[np.ndarray, "windows ..."]:
        """The windows of ``chunk`` of the store at ``uri``, from the bytes at its ``place``, which are not copied.

        ``checksum`` is what the ledger says it has.

        Raises:
            SaexError: the chunk is cut off, has changed, or belongs elsewhere.
        """
        windows = self.chunk_windows(chunk)
        if (trouble := self.trouble(data, checksum)) is not None:
            raise SaexError(
                f"{uri}/{self.name}, windows {windows.start} to {windows.stop - 1}: {trouble}; "
                f"'saex-pipe store repair {uri}' makes its shard again"
            )
        values = np.frombuffer(data, self.dtype, count=self.chunk_bytes // self.dtype.itemsize)
        return values.reshape(self.chunk_shape)[: len(windows)]

    def trouble(self, data: bytes | UInt8[np.ndarray, " bytes"], checksum: int) -> str | None:
        """What is wrong with the bytes of a chunk, None where nothing is."""
        if len(data) != self.stored_chunk_bytes:
            return f"cut off before the end of its {self.stored_chunk_bytes:,} bytes"
        if google_crc32c.value(data) != _RESIDUE:
            return "damaged: its checksum does not fit"
        if int.from_bytes(bytes(data[-CHECKSUM_BYTES:]), "little") != checksum:
            return "not what was written there: its checksum is not the one in the ledger"
        return None
