"""The order of training rows, a pure function of (seed, step).

An epoch is a permutation of the store's chunks, laid end to end as a stream of their kept rows. The stream
is cut into a fixed number of lanes and each lane into pools; the rows of a pool are permuted. Position g of
training (row i of step t is g = t * batch_rows + i) lies in epoch g // rows, and takes its turn in lane
g % lanes, so that every batch draws from all lanes. Hence every kept row comes exactly once an epoch,
whatever the number of hosts, and any step is found without replaying the ones before it.

The lanes change pools one after the other, each an eighth of a pool later than the one before, so that two pools
of memory beyond the lanes' own are enough to read ahead.
"""

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int, Int64

_CHUNKS, _ROWS = 0, 1  # which permutation a random stream is for


class Pool(NamedTuple):
    """Rows that are held in memory together and mixed: positions [start, stop) of one epoch's stream."""

    epoch: int
    start: int
    stop: int


class PoolRows(NamedTuple):
    """Rows next to one another in a batch that come from one pool."""

    pool: Pool
    turns: Int64[np.ndarray, " B"]  # which of the pool's rows in the order they are dealt out, see ``RowOrder.dealt``


class ChunkRows(NamedTuple):
    """Kept rows [first, last) of one chunk, numbered within the chunk."""

    chunk: int
    first: int
    last: int


class RowOrder:
    """Order of the kept rows of a store with ``rows_per_chunk`` kept rows in each chunk.

    ``pool_rows`` bounds the rows of one pool; one pool a lane is in use at any time.
    """

    def __init__(self, rows_per_chunk: Int[np.ndarray, " chunks"], seed: int, pool_rows: int, lanes: int = 8) -> None:
        self.rows_per_chunk = rows_per_chunk
        self.rows = int(rows_per_chunk.sum(dtype=np.int64))  # the length of an epoch
        self.seed, self.pool_rows, self.lanes = seed, pool_rows, lanes

    def epoch_rows(self, epoch: int) -> int:
        """Rows of ``epoch``."""
        return self.rows

    def epoch_chunks(self, epoch: int) -> tuple[int, Int[np.ndarray, " chunks"]]:
        """The first chunk of ``epoch``, and the kept rows of each chunk from there on."""
        return 0, self.rows_per_chunk

    def span(self, start: int, stop: int) -> list[PoolRows]:
        """Where the rows at positions [start, stop) of training come from, lane by lane."""
        parts = []
        for epoch, begin, length in self._epochs(start, stop):
            turn = np.arange(max(start - begin, 0), min(stop - begin, length), dtype=np.int64)
            lane_B, offset_B = turn % self.lanes, turn // self.lanes
            for lane in range(self.lanes):
                here = self._lane_start(epoch, lane) + offset_B[lane_B == lane]
                while len(here):  # ascending positions of the stream; usually all in one pool
                    pool = self._pool_at(epoch, lane, int(here[0]))
                    inside = int(np.searchsorted(here, pool.stop))
                    parts.append(PoolRows(pool, here[:inside] - pool.start))
                    here = here[inside:]
        return parts

    def dealt(self, part: PoolRows) -> Int64[np.ndarray, " B"]:
        """Indices of these rows among the pool's rows in stream order."""
        return _permuted_rows(self.seed, part.pool)[part.turns]

    def _epochs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The epochs that positions [start, stop) lie in: number, first position, rows."""
        for epoch in range(start // self.rows, -(-stop // self.rows)):
            yield epoch, epoch * self.rows, self.rows

    def next_pool(self, pool: Pool) -> Pool | None:
        """The pool that takes over in the same lane when ``pool`` is used up, None where there is none yet."""
        lane = max(lane for lane in range(self.lanes) if self._lane_start(pool.epoch, lane) <= pool.start)
        if pool.stop < self._lane_start(pool.epoch, lane + 1):
            return self._pool_at(pool.epoch, lane, pool.stop)
        following = pool.epoch + 1
        if not self.is_known(following) or self.epoch_rows(following) <= lane:  # a lane may be empty
            return None
        return self._pool_at(following, lane, self._lane_start(following, lane))

    def is_known(self, epoch: int) -> bool:
        """Whether the chunks of ``epoch`` are there without waiting."""
        return True

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

    @property
    def largest_pool(self) -> int:
        """Rows of the largest pool."""
        lengths = {self._lane_start(0, 1), self.rows // self.lanes}  # with one row less there may be a pool less
        return max(-(-length // self._pools(length)) for length in lengths)

    def _lane_start(self, epoch: int, lane: int) -> int:
        rows = self.epoch_rows(epoch)
        return lane * (rows // self.lanes) + min(lane, rows % self.lanes)

    def _pools(self, length: int) -> int:
        """How many full pools a lane of ``length`` rows is cut into."""
        return max(1, -(-length // self.pool_rows))

    def _pool_at(self, epoch: int, lane: int, position: int) -> Pool:
        """The pool of ``lane`` that holds ``position`` of the stream.

        A lane is cut into pools of equal size, but where there are several, the first one is the shorter the lower the
        lane; what it lacks makes the last one.
        """
        start, stop = self._lane_start(epoch, lane), self._lane_start(epoch, lane + 1)
        length = stop - start
        number = self._pools(length)
        lag = (self.lanes - 1 - lane) if number > 1 else 0  # in parts of a pool

        def cut(place: int) -> int:
            return start + min(max(length * (place * self.lanes - lag) // (number * self.lanes), 0), length)

        place = ((position - start) * number * self.lanes // length + lag) // self.lanes
        while cut(place + 1) <= position:
            place += 1
        while cut(place) > position:
            place -= 1
        return Pool(epoch, cut(place), cut(place + 1))

    def _stream(self, epoch: int) -> tuple[Int64[np.ndarray, " chunks"], Int64[np.ndarray, " chunks"]]:
        """The chunks in the order of ``epoch``, and the stream position at which each one ends."""
        return _permuted_chunks(self, epoch)


class Tranches(Protocol):
    """A store that grows: consecutive chunks that are ready together, one tranche after the other."""

    def is_ready(self, tranche: int) -> bool:
        """Whether the tranche can be read."""

    def would_wait(self, tranche: int) -> bool:
        """Whether ``chunks_of`` would wait; not where it would raise, as the tranche is gone for good."""

    def chunks_of(self, tranche: int) -> tuple[int, Int[np.ndarray, " chunks"]]:
        """The first chunk of a tranche and the kept rows of each of its chunks; waits until it is ready.

        After the last tranche comes the first one again.
        """


class TrancheOrder(RowOrder):
    """The order of the rows of a store that is still being written: each tranche is an epoch of its own.

    Nothing depends on when a tranche became ready, so that the order is the same once the store is finished.
    """

    def __init__(self, tranches: Tranches, seed: int, pool_rows: int, lanes: int = 8) -> None:
        super().__init__(np.zeros(0, np.int64), seed, pool_rows, lanes)
        self._tranches = tranches
        self._starts = [0]  # positions at which the tranches known so far begin

    def epoch_rows(self, epoch: int) -> int:
        """Rows of a tranche."""
        return int(self.epoch_chunks(epoch)[1].sum(dtype=np.int64))

    def epoch_chunks(self, epoch: int) -> tuple[int, Int[np.ndarray, " chunks"]]:
        """The chunks of a tranche."""
        return self._tranches.chunks_of(epoch)

    def is_known(self, epoch: int) -> bool:
        """Whether the tranche is ready."""
        return self._tranches.is_ready(epoch)

    @property
    def largest_pool(self) -> int:
        """Rows that the largest pool may have."""
        return self.pool_rows

    def knows(self, position: int) -> bool:
        """Whether the tranche that holds ``position`` was ready when it was last looked for."""
        return position < self._starts[-1]

    def would_wait(self, position: int) -> bool:
        """Whether reading up to ``position`` would wait for a tranche."""
        while not self.knows(position):
            if self._tranches.would_wait(len(self._starts) - 1):
                return True
            self._add_tranche()
        return False

    def tranche_at(self, position: int) -> int:
        """The tranche that holds ``position``; that which follows the known ones need not be ready."""
        while self._starts[-1] < position:
            self._add_tranche()
        return bisect_right(self._starts, position) - 1

    def tranche_around(self, position: int) -> range:
        """All positions of the tranche that holds ``position``."""
        while not self.knows(position):
            self._add_tranche()
        tranche = self.tranche_at(position)
        return range(self._starts[tranche], self._starts[tranche + 1])

    def _add_tranche(self) -> None:
        self._starts.append(self._starts[-1] + self.epoch_rows(len(self._starts) - 1))

    def _epochs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        while start < stop:
            around = self.tranche_around(start)
            yield self.tranche_at(start), around.start, len(around)
            start = around.stop


@lru_cache(maxsize=2)
def _permuted_chunks(order: RowOrder, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    first, rows_per_chunk = order.epoch_chunks(epoch)
    chunk_order = _generator(order.seed, _CHUNKS, epoch, 0).permutation(len(rows_per_chunk))
    return first + chunk_order, np.cumsum(rows_per_chunk[chunk_order], dtype=np.int64)


@lru_cache(maxsize=64)
def _permuted_rows(seed: int, pool: Pool) -> np.ndarray:
    return _generator(seed, _ROWS, pool.epoch, pool.start).permutation(pool.stop - pool.start)


def _generator(seed: int, purpose: int, epoch: int, place: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, purpose, epoch, place]))
