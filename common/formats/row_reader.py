"""Batches of training rows in the order of ``common.shuffle``, read ahead in whole chunks."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Float, Shaped

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.followed_store import FollowedStore
from saex_pipe.common.formats.store_info import DTYPES, KEEP, acts_array, scales_array
from saex_pipe.common.shuffle import Pool, PoolRows

LANES = 8
_READ_AHEAD = 2  # pools beyond those in use
_LOADED_AT_ONCE = 2  # one pool's last chunks are unpacked while the next one's are on their way
READ_AHEAD_FACTOR = (LANES + _READ_AHEAD) / LANES  # all memory, in units of what a batch is drawn from


class _Room(NamedTuple):
    """Memory for one pool of rows: what is stored of each, by array."""

    rows: Mapping[str, Shaped[np.ndarray, "R ..."]]


class RowReader:
    """Training rows of one or several taps of a store.

    ``pool_bytes`` of rows are held and no more: one pool a lane that is in use, and some that threads read
    meanwhile; beside them a few chunks that are being read. The order of rows depends on ``seed`` and ``pool_bytes``
    alone, the rows of one batch lie lane by lane, and of several hosts each asks for its part of every batch.
    """

    def __init__(
        self,
        store: ActivationStore | FollowedStore,
        taps: Sequence[str],
        *,
        seed: int,
        batch_rows: int,
        pool_bytes: int,
    ) -> None:
        self._store, self._taps = store, tuple(dict.fromkeys(taps))
        self._arrays = [acts_array(tap) for tap in self._taps]
        self._arrays += [scales_array(tap) for tap in self._taps if store.info.dtypes[tap] == "int8"]
        row_bytes = sum(map(store.info.row_bytes, self._taps))
        pool_rows = pool_bytes // ((LANES + _READ_AHEAD) * row_bytes)
        if store.rows is not None and store.rows < batch_rows:
            raise InputError(
                f"{store.uri} has {store.rows:,} training rows, fewer than one batch of {batch_rows:,}",
                "harvest more tokens or set train.batch_rows lower",
            )
        if pool_rows < 1:
            raise InputError(
                f"train.pool_bytes = {pool_bytes:,} does not hold {LANES + _READ_AHEAD} rows of {row_bytes:,} bytes",
                "raise train.pool_bytes",
            )
        self.order = store.row_order(seed, pool_rows, LANES)
        self._batch_rows = batch_rows
        # Where the store is smaller than the pools, there is room for those of the next epoch as well.
        rooms = min(2 * LANES, pool_bytes // (self.order.largest_pool * row_bytes))
        self._free = [self._room() for _ in range(rooms)]
        self._pools: dict[Pool, tuple[_Room, Future[None]]] = {}
        self._reader = ThreadPoolExecutor(_LOADED_AT_ONCE, thread_name_prefix="row-reader")
        self.waiting_seconds = 0.0  # spent in ``batch`` waiting for rows to arrive

    def batch(
        self, step: int, part: slice = slice(None), out: Mapping[str, np.ndarray] | None = None
    ) -> Mapping[str, Float[np.ndarray, "B D"]]:
        """The rows of ``step``, by tap, in the store's dtype (float32 where that is int8).

        Any step, in any order; in sequence it is fast.

        Args:
            step: number of the batch.
            part: which of its rows.
            out: arrays to fill, by tap; new ones where it is not given.
        """
        return self.rows(step * self._batch_rows, (step + 1) * self._batch_rows, part, out)

    def rows(
        self, start: int, stop: int, part: slice = slice(None), out: Mapping[str, np.ndarray] | None = None
    ) -> Mapping[str, Float[np.ndarray, "B D"]]:
        """The rows at positions [start, stop) of training; see ``batch``."""
        parts = _cut(self.order.span(start, stop), part)
        self._read_ahead(parts)
        count = sum(len(rows.turns) for rows in parts)
        if out is None:
            out = {tap: np.empty((count, self._width(tap)), self._store.info.decoded_dtype(tap)) for tap in self._taps}
        done = 0
        for number, rows in enumerate(parts):
            place = slice(done, done + len(rows.turns))
            room = self._loaded(rows.pool, later=[other.pool for other in parts[number + 1 :]])
            self._deal(room, rows, {tap: out[tap][place] for tap in self._taps})
            done = place.stop
        return out

    def _read_ahead(self, parts: Sequence[PoolRows]) -> None:
        """Begin to read the pools of a batch and those after them, the soonest needed first, while there is room."""
        current = {rows.pool: int(rows.turns[-1]) for rows in parts}
        by_turn = sorted(current, key=lambda pool: pool.stop - pool.start - current[pool])
        after = [pool for pool in map(self.order.next_pool, by_turn) if pool is not None]
        for pool in [pool for pool in self._pools if pool not in current and pool not in after]:
            self._release(pool)
        for pool in [*current, *after]:
            if pool not in self._pools and self._free:
                self._begin(pool)

    def _loaded(self, pool: Pool, later: Sequence[Pool]) -> _Room:
        """The rows of ``pool``, if need be in the place of another: one that is used up rather than one for later."""
        if pool not in self._pools:
            if not self._free:
                self._release(next((other for other in self._pools if other not in later), next(reversed(self._pools))))
            self._begin(pool)
        room, loading = self._pools[pool]
        start = time.monotonic()
        loading.result()
        self.waiting_seconds += time.monotonic() - start
        return room

    def _begin(self, pool: Pool) -> None:
        room = self._free.pop()
        self._pools[pool] = room, self._reader.submit(self._load, pool, room)

    def _release(self, pool: Pool) -> None:
        room, loading = self._pools.pop(pool)
        if not loading.cancel():
            loading.exception()  # the room is free once nothing is read into it any more
        self._free.append(room)

    def _load(self, pool: Pool, room: _Room) -> None:
        pieces = self.order.chunks(pool)
        chunks = [piece.chunk for piece in pieces]
        keeps = self._store.chunks(KEEP, chunks)
        arrays = [(room.rows[name], self._store.chunks(name, chunks)) for name in self._arrays]
        done = 0
        for piece, keep_NL in zip(pieces, keeps, strict=True):
            train = self._store.info.train_windows - self._store.layouts[KEEP].chunk_windows(piece.chunk).start
            flat = np.flatnonzero(keep_NL[: max(train, 0)])[piece.first : piece.last]
            for target, values in arrays:
                stored = next(values)
                take_rows(stored.reshape(-1, *stored.shape[2:]), flat, target[done : done + len(flat)])
            done += len(flat)

    def _deal(self, room: _Room, part: PoolRows, out: Mapping[str, np.ndarray]) -> None:
        dealt = self.order.dealt(part)
        for tap in self._taps:
            stored_RD = room.rows[acts_array(tap)]
            channels = self._store.info.channels.get(tap)
            if channels is None:
                take_rows(stored_RD, dealt, out[tap])
            else:
                out[tap][...] = channels.decode(stored_RD[dealt], room.rows[scales_array(tap)][dealt])

    def _room(self) -> _Room:
        size = self.order.largest_pool
        rows: dict[str, np.ndarray] = {}
        for tap in self._taps:
            dtype = self._store.info.dtypes[tap]
            rows[acts_array(tap)] = np.empty((size, self._width(tap)), DTYPES[dtype])
            if dtype == "int8":
                rows[scales_array(tap)] = np.empty(size, np.float32)
        return _Room(rows)

    def _width(self, tap: str) -> int:
        return self._store.info.taps[tap]

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def take_rows(source: Shaped[np.ndarray, "R ..."], rows: np.ndarray, out: Shaped[np.ndarray, "B ..."]) -> None:
    """``out[...] = source[rows]``, in the widest words that a row divides into: several times as fast."""
    size = source.dtype.itemsize * int(np.prod(source.shape[1:]))
    word = next(np.dtype(f"u{width}") for width in (8, 4, 2, 1) if size % width == 0)
    source_BW, out_BW = (np.ascontiguousarray(a).reshape(len(a), -1).view(word) for a in (source, out))
    np.take(source_BW, rows, axis=0, out=out_BW, mode="clip")


def _cut(parts: Sequence[PoolRows], rows: slice) -> list[PoolRows]:
    """The part of a batch that is asked for."""
    start, stop, _ = rows.indices(sum(len(part.turns) for part in parts))
    found, begin = [], 0
    for part in parts:
        turns = part.turns[max(start - begin, 0) : max(stop - begin, 0)]
        if len(turns):
            found.append(PoolRows(part.pool, turns))
        begin += len(part.turns)
    return found
