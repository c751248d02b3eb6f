"""The order of training rows, a pure function of (seed, step).

An epoch is a permutation of the store's chunks, laid end to end as a stream of their kept rows. The stream
is cut into a fixed number of lanes and each lane into pools; the rows of a pool are permuted. Position g of
training (row i of step t is g = t * batch_rows + i) lies in epoch g // rows, and takes its turn in lane
g % lanes, so that every batch draws from all lanes. Hence every kept row comes exactly once an epoch,
whatever the number of hosts, and any step is found without replaying the ones before it.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

_CHUNKS, _ROWS = 0, 1  # which permutation a random stream is for


class Pool(NamedTuple):
    """Rows that are held in memory together and mixed: positions [start, stop) of one epoch's stream."""

    epoch: int
    start: int
    stop: int


class PoolRows(NamedTuple):
    """The rows of one batch that come from one pool."""

    pool: Pool
    rows: Int64[np.ndarray, " B"]  # indices into the pool's rows in stream order


class ChunkRows(NamedTuple):
    """Kept rows [first, last) of one chunk, numbered within the chunk."""

    chunk: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class RowOrder:
    """Order of the kept rows of a store with ``rows_per_chunk`` kept rows in each chunk.

    ``pool_rows`` bounds the rows of one pool; one pool a lane is in use at any time.
    """

    rows_per_chunk: Int64[np.ndarray, " chunks"]
    seed: int
    pool_rows: int
    lanes: int = 8

    @cached_property
    def rows(self) -> int:
        """Kept rows of the store: the length of an epoch."""
        return int(self.rows_per_chunk.sum())

    def batch(self, step: int, batch_rows: int) -> list[PoolRows]:
        """Where the ``batch_rows`` rows of step ``step`` come from, in the order of the batch."""
        position_B = np.arange(step * batch_rows, (step + 1) * batch_rows, dtype=np.int64)
        epoch_B, turn_B = np.divmod(position_B, self.rows)
        lane_B, offset_B = turn_B % self.lanes, turn_B // self.lanes
        parts = []
        for epoch in np.unique(epoch_B):
            for lane in range(self.lanes):
                here = self._lane_start(lane) + offset_B[(epoch_B == epoch) & (lane_B == lane)]
                while len(here):  # ascending positions of the stream; usually all in one pool
                    pool = self._pool_at(int(epoch), lane, int(here[0]))
                    inside = int(np.searchsorted(here, pool.stop))
                    parts.append(PoolRows(pool, self._permutation(pool)[here[:inside] - pool.start]))
                    here = here[inside:]
        return parts

    def next_pool(self, pool: Pool) -> Pool:
        """The pool that takes over in the same lane when ``pool`` is used up."""
        lane = max(lane for lane in range(self.lanes) if self._lane_start(lane) <= pool.start)
        if pool.stop < self._lane_start(lane + 1):
            return self._pool_at(pool.epoch, lane, pool.stop)
        return self._pool_at(pool.epoch + 1, lane, self._lane_start(lane))

    def chunks(self, pool: Pool) -> list[ChunkRows]:
        """The pieces of chunks that make up ``pool``, in stream order."""
        chunk_order, ends = self._stream(pool.epoch)
        first = int(np.searchsorted(ends, pool.start, side="right"))
        pieces = []
        for place in range(first, len(chunk_order)):
            begin = int(ends[place - 1]) if place else 0
            if begin >= pool.stop:
                break
            end = int(ends[place])
            if end > begin:
                piece = max(pool.start, begin) - begin, min(pool.stop, end) - begin
                pieces.append(ChunkRows(int(chunk_order[place]), *piece))
        return pieces

    def _lane_start(self, lane: int) -> int:
        return lane * (self.rows // self.lanes) + min(lane, self.rows % self.lanes)

    def _pool_at(self, epoch: int, lane: int, position: int) -> Pool:
        """The pool of ``lane`` that holds ``position`` of the stream; a lane is cut into pools of equal size."""
        start, stop = self._lane_start(lane), self._lane_start(lane + 1)
        number = max(1, -(-(stop - start) // self.pool_rows))

        def cut(place: int) -> int:
            return start + (stop - start) * place // number

        place = ((position - start + 1) * number - 1) // (stop - start)
        return Pool(epoch, cut(place), cut(place + 1))

    def _stream(self, epoch: int) -> tuple[Int64[np.ndarray, " chunks"], Int64[np.ndarray, " chunks"]]:
        """The chunks in the order of ``epoch``, and the stream position at which each one ends."""
        return _permuted_chunks(self, epoch)

    def _permutation(self, pool: Pool) -> Int64[np.ndarray, " rows"]:
        return _permuted_rows(self.seed, pool)


@lru_cache(maxsize=4)
def _permuted_chunks(order: RowOrder, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    chunk_order = _generator(order.seed, _CHUNKS, epoch, 0).permutation(len(order.rows_per_chunk))
    return chunk_order, np.cumsum(order.rows_per_chunk[chunk_order])


@lru_cache(maxsize=64)
def _permuted_rows(seed: int, pool: Pool) -> np.ndarray:
    return _generator(seed, _ROWS, pool.epoch, pool.start).permutation(pool.stop - pool.start)


def _generator(seed: int, purpose: int, epoch: int, place: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, purpose, epoch, place]))
