"""Batches of training rows in the order of ``common.shuffle``, read ahead in whole chunks."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import Float

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import DTYPES, ActivationStore
from saex_pipe.common.shuffle import Pool, RowOrder

_LANES = 8


class RowReader:
    """Training rows of one or several taps of a store.

    Some ``pool_bytes`` of rows are held: the pools in use and, read by a thread meanwhile, the ones after them
    (half as much again while a lane goes from one to the next). The order of rows
    depends on ``seed`` and ``pool_bytes`` alone.
    """

    def __init__(
        self, store: ActivationStore, taps: Sequence[str], *, seed: int, batch_rows: int, pool_bytes: int
    ) -> None:
        self._store, self._taps = store, tuple(taps)
        self._dtype = DTYPES[store.info.dtype]
        row_bytes = sum(store.info.taps[tap] for tap in self._taps) * self._dtype.itemsize
        pool_rows = pool_bytes // (2 * _LANES * row_bytes)
        if store.rows < batch_rows:
            raise InputError(
                f"{store.uri} has {store.rows:,} training rows, fewer than one batch of {batch_rows:,}",
                "harvest more tokens or set train.batch_rows lower",
            )
        if pool_rows < 1:
            raise InputError(
                f"train.pool_bytes = {pool_bytes:,} does not hold {2 * _LANES} rows of {row_bytes:,} bytes",
                "raise train.pool_bytes",
            )
        self.order = RowOrder(store.rows_per_chunk(), seed, pool_rows, _LANES)
        self._batch_rows = batch_rows
        self._pools: dict[Pool, Future[dict[str, np.ndarray]]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="row-reader")
        self.waiting_seconds = 0.0  # spent in ``batch`` waiting for rows to arrive

    def batch(self, step: int) -> Mapping[str, Float[np.ndarray, "B D"]]:
        """The rows of ``step``, by tap, in the store's dtype. Any step, in any order; in sequence it is fast."""
        parts = self.order.batch(step, self._batch_rows)
        current = [part.pool for part in parts]
        wanted = dict.fromkeys([*current, *(self.order.next_pool(pool) for pool in current)])
        self._pools = {pool: rows for pool, rows in self._pools.items() if pool in wanted}
        for pool in wanted:
            if pool not in self._pools:
                self._pools[pool] = self._reader.submit(self._load, pool)
        start = time.monotonic()
        loaded = {pool: self._pools[pool].result() for pool in current}
        self.waiting_seconds += time.monotonic() - start
        return {tap: np.concatenate([loaded[part.pool][tap][part.rows] for part in parts]) for tap in self._taps}

    def _load(self, pool: Pool) -> dict[str, np.ndarray]:
        rows = pool.stop - pool.start
        out = {tap: np.empty((rows, self._store.info.taps[tap]), self._dtype) for tap in self._taps}
        done = 0
        for chunk, first, last in self.order.chunks(pool):
            windows = self._store.chunk_windows(chunk)
            flat = np.flatnonzero(self._store.train_keep(windows))[first:last]
            for tap in self._taps:
                acts_NLD = self._store.acts(tap, windows)
                out[tap][done : done + len(flat)] = acts_NLD.reshape(-1, acts_NLD.shape[-1])[flat]
            done += len(flat)
        return out

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    def __enter__(self) -> "RowReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
