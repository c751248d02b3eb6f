"""Host and device at work at once: passes queued before earlier ones are fetched, and a clock of the device's waits."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self, TypeVar

import jax

from saex_pipe.stages.harvest.forward import Forward, Harvested
from saex_pipe.stages.harvest.shard import Batch

_Result = TypeVar("_Result")


def ahead(work: Iterable[Future[_Result]], number: int) -> Iterator[_Result]:
    """The results of ``work`` in its order; asking ``work`` for its next future is what starts that one.

    While the caller waits for a result, or is busy with it, ``number`` later ones are under way: at most
    ``number`` + 1 are held at any time.
    """
    started: deque[Future[_Result]] = deque()
    for future in work:
        started.append(future)
        if len(started) > number:
            yield started.popleft().result()
    while started:
        yield started.popleft().result()


class DeviceClock:
    """Measures the time in which no forward pass is queued or running on the device, from its making on; thread-safe.

    A pass counts from the moment it is handed to JAX to the moment its last output is there. Copying that to the
    host does not count: a device that has nothing else to do then waits.
    """

    def __init__(self) -> None:
        self._start = self._idle_since = time.monotonic()
        self._waited = 0.0
        self._passes = 0  # queued or running
        self._lock = threading.Lock()

    def begin_pass(self) -> None:
        """A pass is being handed to the device."""
        with self._lock:
            if self._passes == 0:
                self._waited += time.monotonic() - self._idle_since
            self._passes += 1

    def end_pass(self) -> None:
        """A pass is complete."""
        with self._lock:
            self._passes -= 1
            if self._passes == 0:
                self._idle_since = time.monotonic()

    def read(self) -> tuple[float, float]:
        """Seconds that the device waited, and all seconds, so far."""
        with self._lock:
            now = time.monotonic()
            idle = now - self._idle_since if self._passes == 0 else 0.0
            return self._waited + idle, now - self._start


class Passes:
    """Forward passes one behind the other on the device, each fetched into its shard by a thread that waits for it."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._fetching = ThreadPoolExecutor(1)
        self.clock = DeviceClock()

    def submit(self, batch: Batch) -> Future[Batch]:
        """Queue the pass of ``batch``, and return it once its activations are in the shard."""
        self.clock.begin_pass()
        return self._fetching.submit(self._fetch, batch, self._forward(batch.tokens_NL))

    def _fetch(self, batch: Batch, harvested: Harvested) -> Batch:
        jax.block_until_ready(harvested)
        self.clock.end_pass()
        batch.fill(harvested)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._fetching.shutdown()
