"""Where the rows of a training run come from: one store, several mixed, or one that is still being written."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.followed_store import FollowedStore, frees_shards, release_shards
from saex_pipe.common.formats.mixed_stores import MixedReader, MixedStores
from saex_pipe.common.formats.row_reader import LANES, READ_AHEAD_FACTOR, RowReader
from saex_pipe.common.formats.store_info import StoreInfo
from saex_pipe.common.llm.taps import matching
from saex_pipe.common.preemption import StopRequest
from saex_pipe.common.shuffle import TrancheOrder
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.processes import arrived, is_first

MOST_MATES = 1.0
_SMALLEST_POOL, _LARGEST_POOL = 1 << 30, 8 << 30

Rows: TypeAlias = ActivationStore | FollowedStore | MixedStores
Reader: TypeAlias = RowReader | MixedReader


class Sides(NamedTuple):
    """The taps that are encoded and those that are predicted: one each, or all of a crosscoder on both sides."""

    input: tuple[str, ...]
    target: tuple[str, ...]

    @property
    def taps(self) -> tuple[str, ...]:
        """All, each once."""
        return tuple(dict.fromkeys(self.input + self.target))


def open_rows(config: Config, stop: StopRequest) -> tuple[Rows, Sides]:
    """The rows to train on, and which taps of them are encoded and predicted."""
    if config.follow:
        if config.other_stores:
            raise InputError("train.follow and train.other_stores contradict each other", "mix finished stores")
        followed = FollowedStore(config.store, lambda store: _tranche_shards(config, store), stop.raise_if_requested)
        return followed, _sides(config, followed)
    store = ActivationStore(config.store)
    sides = _sides(config, store)
    if not config.other_stores:
        return store, sides
    stores = [store, *map(ActivationStore, config.other_stores)]
    return MixedStores(stores, sides.taps, config.store_weights), sides


def make_reader(config: Config, store: Rows, taps: tuple[str, ...]) -> Reader:
    """Batches of these rows."""
    settings = {"seed": config.seed, "batch_rows": config.batch_rows, "pool_bytes": pool_bytes(config, store, taps)}
    if isinstance(store, MixedStores):
        return MixedReader(store, taps, **settings)
    return RowReader(store, taps, **settings)


def tranche_order(reader: Reader) -> TrancheOrder | None:
    """The order in which a followed store is read; None where the rows are of finished ones."""
    order = reader.order if isinstance(reader, RowReader) else None
    return order if isinstance(order, TrancheOrder) else None


def pool_bytes(config: Config, store: Rows, taps: Sequence[str]) -> int:
    """Memory for rows: what is set, or the default; of a followed store all of a tranche where 8 GiB hold that."""
    if config.pool_bytes is not None:
        return config.pool_bytes
    found = default_pool_bytes(config.batch_rows, store.info, taps)
    if not isinstance(store, FollowedStore):
        return found
    row_bytes = sum(map(store.info.row_bytes, taps))  # a row more for each lane: they may differ by one
    return max(found, min(math.ceil((store.tranche_rows + LANES) * row_bytes * READ_AHEAD_FACTOR), _LARGEST_POOL))


def default_pool_bytes(batch_rows: int, info: StoreInfo, taps: Sequence[str]) -> int:
    """Memory for rows with which one row of a batch meets ``MOST_MATES`` others of its window on average.

    Rows of one window are alike, so that a batch which holds several of them says less than its size: with a
    correlation r between them the variance of its mean grows by r times their number. The bound is kept up to
    8 GiB, that is to 2,048 rows of 4.6 kB in windows of 750 tokens.
    """
    row_bytes = sum(map(info.row_bytes, taps))
    rows = batch_rows * info.window_length / MOST_MATES
    return int(min(max(rows * row_bytes * READ_AHEAD_FACTOR, _SMALLEST_POOL), _LARGEST_POOL))


def _tranche_shards(config: Config, store: FollowedStore) -> int:
    """How many shards of a followed store are mixed together: as many as meet the bound of ``default_pool_bytes``.

    Where there is room for fewer, half of those: a tranche is freed once the next one is there.
    """
    room = store.room_shards
    if config.tranche_shards is not None:
        if room is not None and min(2 * config.tranche_shards, store.shards) > room:
            raise InputError(
                f"train.tranche_shards = {config.tranche_shards}, but {config.store} holds {room} shards at a time "
                "(harvest.max_store_bytes), and one tranche is freed once the next one is there",
                f"set it to {room // 2} or less",
            )
        return config.tranche_shards
    info, taps = store.info, _sides(config, store).taps
    pool_rows = (config.pool_bytes or _LARGEST_POOL) / READ_AHEAD_FACTOR / sum(map(info.row_bytes, taps)) - LANES
    wanted = pool_rows / (info.tiling.shard_windows * info.window_length)
    if config.pool_bytes is None:
        wanted = min(wanted, math.ceil(config.batch_rows / MOST_MATES / info.tiling.shard_windows))
    return max(1, int(wanted if room is None else min(wanted, room // 2)))


def joined(batch: Mapping[str, np.ndarray], taps: Sequence[str]) -> Float[np.ndarray, "B D"]:
    """The rows of several taps, one beside the other."""
    return batch[taps[0]] if len(taps) == 1 else np.concatenate([batch[tap] for tap in taps], axis=1)


def first_rows(config: Config, store: Rows, taps: tuple[str, ...], *, resumed: bool) -> dict[str, np.ndarray]:
    """The first ``sample_rows`` rows of training, by tap, float32; as many zeros where it is ``resumed``.

    Of a store that is followed they are of the first tranche: its writer may wait for room until that is learnt from.
    """
    if store.rows is None:  # whole batches, as the last might reach beyond the tranche
        rows = min(config.sample_rows, store.statistics(taps[0]).count)
        count = max(1, rows // config.batch_rows) * config.batch_rows
    else:
        count = min(config.sample_rows, store.rows)
    if resumed:
        return {tap: np.zeros((count, store.info.taps[tap]), np.float32) for tap in taps}
    with make_reader(config, store, taps) as reader:
        batches = [reader.batch(step, slice(None)) for step in range(-(-count // config.batch_rows))]
        return {tap: np.concatenate([batch[tap] for batch in batches])[:count].astype(np.float32) for tap in taps}


class Arrivals:
    """Waits for the rows of a store that is still being written, all processes of a run together."""

    def __init__(self, reader: Reader, batch_rows: int, stop: StopRequest) -> None:
        self._order, self._batch_rows, self._stop = tranche_order(reader), batch_rows, stop
        self.waiting_seconds = 0.0

    def has(self, step: int) -> bool:
        """True once the rows of ``step`` are there, False once the run is to stop instead."""
        order, last = self._order, (step + 1) * self._batch_rows - 1
        if order is None or order.knows(last):
            return True
        start = time.monotonic()
        found = arrived(lambda: order.would_wait(last), self._stop)
        self.waiting_seconds += time.monotonic() - start
        return found


class Returns:
    """Gives shards back to a writer that waits for room, once what was learnt from them is saved."""

    def __init__(self, config: Config, store: Rows, reader: Reader, digest: str) -> None:
        self._batch_rows, self._store, self._reader = config.batch_rows, store, digest[:16]
        order = tranche_order(reader)
        self._order = order if order is not None and frees_shards(Folder(store.uri)) else None
        self._returned = 0  # the first tranche that was not given back
        if self._order is not None:
            self.release(0)  # from now on the others wait for this reader, too

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is the first that needs nothing of a tranche that was not given back yet."""
        return self._order is not None and self._tranche(step) > self._returned

    def release(self, step: int) -> None:
        """Give back what ``step`` and those after it do not need; the state before ``step`` must be durable."""
        assert isinstance(self._store, FollowedStore)
        self._returned = self._tranche(step) if step else 0
        if is_first():
            first = self._store.first_shard(self._returned)
            release_shards(Folder(self._store.uri), self._store.info, self._reader, first)

    def _tranche(self, step: int) -> int:
        assert self._order is not None
        return self._order.tranche_at(step * self._batch_rows)


def _sides(config: Config, store: ActivationStore | FollowedStore) -> Sides:
    available = list(store.info.taps)
    if config.taps:
        return _crosscoder_sides(config, available)
    if config.tap is None and len(available) > 1:
        raise InputError(
            f"train.tap is missing, and {config.store} holds {', '.join(available)}", "set it to one of them"
        )
    tap = config.tap or available[0]
    sides = Sides((tap,), (config.target_tap or tap,))
    for name in sides.taps:
        store.require_tap(name)
    return sides


def _crosscoder_sides(config: Config, available: Sequence[str]) -> Sides:
    if config.tap is not None or config.target_tap is not None:
        raise InputError("train.taps and train.tap or target_tap contradict each other", "a crosscoder has taps only")
    found: set[str] = set()
    for pattern in config.taps:
        names = matching(pattern, available)
        if not names:
            raise InputError(f"{config.store} has no tap {pattern!r}", f"it holds {', '.join(available)}")
        found.update(names)
    if len(found) < 2:
        raise InputError(f"train.taps = {', '.join(config.taps)} is one tap", "name several, or set train.tap")
    taps = tuple(tap for tap in available if tap in found)
    return Sides(taps, taps)
