"""An activation store that is still being written, read in the order of its shards.

``store.json``        what the store is made of, written before its first shard
``room.json``         how many bytes its writers may fill, and how many at first; not there where they never wait
``readers/ID.json``   up to which shard a reader has got, its results saved: it will not ask for earlier ones again
``freed.json``        below which shard the data are gone, because every reader has got beyond

Only a harvest with ``max_store_bytes`` lets readers free shards; their ledger entries stay.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from saex_pipe.common.config import canonical_digest
from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.chunk_index import checksums_from_text
from saex_pipe.common.formats.chunk_reads import ChunkReads
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import STARTED
from saex_pipe.common.formats.shard import ArrayLayout
from saex_pipe.common.formats.statistics import ActivationStatistics
from saex_pipe.common.formats.store_info import STORE, StoreInfo
from saex_pipe.common.shuffle import TrancheOrder

_ROOM, _FREED = "room.json", "freed.json"
_POLL_SECONDS = 1.0


class FollowedStore(ChunkReads):
    """A store of which the finished shards are read, in the order of their numbers.

    So many shards are waited for and mixed together as ``tranche_shards`` says, given the store. ``check_stop`` is
    called while shards are waited for, and may raise; ``would_wait`` tells ahead, for who has something to save first.
    """

    def __init__(
        self, uri: str, tranche_shards: "Callable[[FollowedStore], int]", check_stop: Callable[[], None]
    ) -> None:
        self.uri = uri
        self.rows = None  # nobody knows yet
        self._folder = Folder(uri)
        self._check_stop = check_stop
        self._wait_for(lambda: self._folder.read(STORE) is not None)
        self.info = StoreInfo.from_json(json.loads(self._folder.read(STORE) or b"{}"))
        self.digest = canonical_digest(json.loads(self._folder.read(STARTED) or b"{}"))
        self.shards = len(self.info.tiling.shards(self.info.windows))
        self._tranche_shards = min(tranche_shards(self), self.shards)
        self._tranches = -(-self.shards // self._tranche_shards)
        self._entries: dict[int, dict[str, Any]] = {}  # by shard; checksums decoded
        self._ready: dict[int, tuple[int, np.ndarray]] = {}  # by tranche
        self._looked: dict[int, float] = {}  # when a tranche was last found wanting: buckets charge for every look
        super().__init__(self._folder, self.info, self._checksum_of)

    @property
    def room_shards(self) -> int | None:
        """How many shards there may be at a time, by what the store was begun with; None where none are freed."""
        data = self._folder.read(_ROOM)
        return None if data is None else _first_bytes(data) // self.info.shard_bytes

    @property
    def tranche_rows(self) -> int:
        """How many rows a tranche may have."""
        return self._tranche_shards * self.info.tiling.shard_windows * self.info.window_length

    def require_tap(self, tap: str) -> int:
        """The width of ``tap``; an InputError names the taps the store has."""
        if tap not in self.info.taps:
            raise InputError(f"{self.uri} has no tap {tap!r}", f"it holds {', '.join(self.info.taps)}")
        return self.info.taps[tap]

    def statistics(self, tap: str) -> ActivationStatistics:
        """Statistics of the training rows of ``tap`` in the first tranche, however much of the store there is."""
        self.chunks_of(0)
        parts = [self._entries[shard]["statistics"][tap] for shard in self._shards_of(0)]
        return ActivationStatistics.merge([ActivationStatistics.from_json(part) for part in parts])

    def row_order(self, seed: int, pool_rows: int, lanes: int) -> TrancheOrder:
        """The order of training rows."""
        return TrancheOrder(self, seed, pool_rows, lanes)

    def is_ready(self, tranche: int) -> bool:
        """Whether every shard of the tranche is finished, and not freed since it was read before."""
        shards = self._shards_of(tranche)
        now = time.monotonic()
        if now - self._looked.get(shards.start, -_POLL_SECONDS) < _POLL_SECONDS:
            return False
        if self._is_gone(tranche) or any(
            shard not in self._entries and not self._load_entry(shard) for shard in shards
        ):
            self._looked[shards.start] = now
            return False
        self._looked.pop(shards.start, None)
        return True

    def would_wait(self, tranche: int) -> bool:
        """Whether ``chunks_of`` would wait; not where it would raise, as shards of the tranche were freed."""
        return tranche not in self._ready and not self.is_ready(tranche) and not self._is_gone(tranche)

    def chunks_of(self, tranche: int) -> tuple[int, Int[np.ndarray, " chunks"]]:
        """The first chunk of a tranche and the training rows of each of its chunks; waits until it is finished."""
        shards = self._shards_of(tranche)
        if tranche not in self._ready:
            if self._is_gone(tranche):
                raise self._freed(shards.start)
            if not self.is_ready(tranche):
                self._wait_for(lambda: self.is_ready(tranche))
            rows = np.concatenate([np.asarray(self._entries[shard]["rows_per_chunk"], np.int64) for shard in shards])
            self._ready[tranche] = shards.start * self.info.tiling.chunks_per_shard, rows
        return self._ready[tranche]

    def first_shard(self, tranche: int) -> int:
        """Of the tranche; after the last tranche comes the first again."""
        return self._shards_of(tranche).start

    def _is_gone(self, tranche: int) -> bool:
        """Whether it comes after the last one, for which shards are needed again that were freed."""
        return tranche >= self._tranches and freed_below(self._folder) > 0

    def _shards_of(self, tranche: int) -> range:
        start = tranche % self._tranches * self._tranche_shards
        return range(start, min(start + self._tranche_shards, self.shards))

    def _load_entry(self, shard: int) -> bool:
        data = self._folder.read(f"ledger/{shard:06d}.json")
        if data is None:
            return False
        entry = json.loads(data)
        entry["checksums"] = {name: checksums_from_text(text) for name, text in entry["checksums"].items()}
        self._entries[shard] = entry
        return True

    def _checksum_of(self, array: str, chunk: int) -> int:
        shard, number = divmod(chunk, self.info.tiling.chunks_per_shard)
        return int(self._entries[shard]["checksums"][array][number])

    def _missing(self, layout: ArrayLayout, chunk: int) -> SaexError:
        shard = chunk // self.info.tiling.chunks_per_shard
        return self._freed(shard) if shard < freed_below(self._folder) else super()._missing(layout, chunk)

    def _freed(self, shard: int) -> SaexError:
        return SaexError(
            f"{self.uri}: shard {shard} is needed, but readers have freed it; harvest again, "
            "without max_store_bytes or with every reader started first"
        )

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self._check_stop()
            time.sleep(_POLL_SECONDS)


class Room:
    """The room that a store with ``max_bytes`` leaves to its writers, and what its readers give back.

    Readers mix as many shards as there was room for at first, so that it may grow, but not shrink.
    """

    def __init__(self, folder: Folder, info: StoreInfo, max_bytes: int) -> None:
        self._folder = folder
        self._shards = max_bytes // info.shard_bytes
        if self._shards < 2:
            raise InputError(
                f"harvest.max_store_bytes = {max_bytes:,} does not hold two shards",
                "raise it, or set harvest.shard_windows lower",
            )
        found = folder.read(_ROOM)
        first = max_bytes if found is None else _first_bytes(found)
        if max_bytes < first:
            raise InputError(
                f"harvest.max_store_bytes = {max_bytes:,}, and {folder.uri} was begun with {first:,}, which its "
                "followers may need",
                f"set it to {first:,} or more",
            )
        folder.write(_ROOM, json.dumps({"max_bytes": max_bytes, "first_bytes": first}).encode())

    def has(self, shard: int) -> bool:
        """Whether there is room for ``shard``."""
        return shard < freed_below(self._folder) + self._shards


def _first_bytes(room: bytes) -> int:
    found = json.loads(room)
    return int(found.get("first_bytes", found["max_bytes"]))


def freed_below(folder: Folder) -> int:
    """The first shard whose data readers have not freed."""
    data = folder.read(_FREED)
    return 0 if data is None else int(json.loads(data)["below"])


def frees_shards(folder: Folder) -> bool:
    """Whether the writers of this store wait for its readers to free shards."""
    return folder.read(_ROOM) is not None


def release_shards(folder: Folder, info: StoreInfo, reader: str, below: int) -> None:
    """Say that ``reader`` needs no shard before ``below`` again, and delete the data that no reader needs."""
    folder.write(f"readers/{reader}.json", json.dumps({"below": below}).encode())
    readers = [json.loads(data)["below"] for name in folder.list("readers/") if (data := folder.read(name)) is not None]
    start, stop = freed_below(folder), min(readers)
    if stop <= start:
        return
    folder.write(_FREED, json.dumps({"below": stop}).encode())  # first: nobody may take what is going for missing
    for shard in range(start, stop):
        for layout in info.layouts().values():
            folder.delete(layout.shard_object(shard))
