"""Chunks of a store's arrays, some requests ahead, each checked against the checksum it was written with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int32, Shaped, UInt8

from saex_pipe.common.errors import SaexError
from saex_pipe.common.formats.folder import Folder, explain_storage_error
from saex_pipe.common.formats.local_disk import DiskReads
from saex_pipe.common.formats.shard import ArrayLayout
from saex_pipe.common.formats.store_info import KEEP, TOKENS, StoreInfo, acts_array, scales_array

# In flight for one array of one pool: on a disk 8 are a fifth faster than 4 and as fast as 12; a bucket is far away.
_LOCAL_REQUESTS, _REMOTE_REQUESTS = 8, 16


class ChunkReads:
    """The arrays of a store in ``folder``; ``checksum`` says what a chunk of an array was written with."""

    def __init__(self, folder: Folder, info: StoreInfo, checksum: Callable[[str, int], int]) -> None:
        self._folder = folder
        self._info = info
        self.layouts: Mapping[str, ArrayLayout] = info.layouts()
        self._checksum = checksum
        local = folder.local_path()
        self._ahead = _LOCAL_REQUESTS if local is not None else _REMOTE_REQUESTS
        self._disk = None if local is None else DiskReads(local, _LOCAL_REQUESTS)

    def tokens(self, windows: range) -> Int32[np.ndarray, "N L"]:
        """Token ids."""
        return self._windows(TOKENS, windows)

    def keep(self, windows: range) -> Bool[np.ndarray, "N L"]:
        """Which tokens are rows, held-out windows included."""
        return self._windows(KEEP, windows)

    def train_keep(self, windows: range) -> Bool[np.ndarray, "N L"]:
        """Which tokens are training rows."""
        return self.keep(windows) & (np.asarray(windows) < self._info.train_windows)[:, None]

    def acts(self, tap: str, windows: range) -> Float[np.ndarray, "N L D"]:
        """Activations in the store's dtype, float32 where that is int8."""
        values_NLD = self._windows(acts_array(tap), windows)
        if self._info.dtypes[tap] != "int8":
            return values_NLD
        return self._info.channels[tap].decode(values_NLD, self._windows(scales_array(tap), windows))

    def chunks(self, array: str, chunks: Sequence[int]) -> Iterator[Shaped[np.ndarray, "windows ..."]]:
        """The windows of each of ``chunks``, as they are stored, each valid until the next one is asked for.

        Some chunks are read ahead.
        """
        layout = self.layouts[array]
        pending = ((chunk, self._request(layout, chunk)) for chunk in chunks)
        started = list(islice(pending, self._ahead))
        while started:
            chunk, request = started.pop(0)
            data, checksum = self._received(layout, chunk, request), self._checksum(array, chunk)
            yield layout.decode(chunk, data, checksum, self._folder.uri)
            if self._disk is not None:
                self._disk.give_back(data)
            started += islice(pending, 1)

    def _request(self, layout: ArrayLayout, chunk: int) -> Any:
        place = layout.place(chunk)
        if self._disk is not None:
            return self._disk.start(place.object, place.bytes)
        return self._folder.objects.read(place.object, byte_range=place.bytes)

    def _received(self, layout: ArrayLayout, chunk: int, request: Any) -> UInt8[np.ndarray, " bytes"]:
        place = layout.place(chunk)
        try:
            result = request.result()
        except (ValueError, OSError) as error:
            if "OUT_OF_RANGE" not in str(error):
                explain_storage_error(error, f"{self._folder.uri}/{place.object}", "read")
            return np.empty(0, np.uint8)  # the object is shorter: a chunk that is cut off
        if self._disk is None:
            result = np.frombuffer(result.value, np.uint8) if result.state == "value" else None
        if result is None:
            raise self._missing(layout, chunk)
        return result

    def _missing(self, layout: ArrayLayout, chunk: int) -> SaexError:
        """What to say where the shard of ``chunk`` is not there."""
        windows = layout.chunk_windows(chunk)
        return SaexError(
            f"{self._folder.uri}/{layout.name} lacks the shard with windows {windows.start} to {windows.stop - 1}; "
            f"'saex-pipe store repair {self._folder.uri}' makes it again"
        )

    def _windows(self, array: str, windows: range) -> np.ndarray:
        layout = self.layouts[array]
        size = layout.tiling.chunk_windows
        out = np.empty((len(windows), *layout.shape[1:]), layout.dtype)
        chunks = range(windows.start // size, -(-windows.stop // size))
        for chunk, values in zip(chunks, self.chunks(array, chunks), strict=True):
            first, last = max(windows.start, chunk * size), min(windows.stop, (chunk + 1) * size)
            out[first - windows.start : last - windows.start] = values[first - chunk * size : last - chunk * size]
        return out
