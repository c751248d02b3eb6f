"""SIGTERM means "the machine goes away": finish the work in hand, commit it, exit with status 75."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from saex_pipe.common.errors import PreemptedError


class StopRequest:
    """Whether SIGTERM has arrived; ``raise_if_requested`` is called where everything finished is committed."""

    def __init__(self) -> None:
        self.requested = False

    def raise_if_requested(self) -> None:
        """Raise PreemptedError (exit status 75) once SIGTERM has arrived."""
        if self.requested:
            raise PreemptedError("stopped by SIGTERM with everything finished committed; run the same command again")


@contextmanager
def graceful_stop(*, at_once: bool = False) -> Iterator[StopRequest]:
    """Turn SIGTERM into a ``StopRequest`` inside the block (in the main thread; elsewhere nothing changes).

    With ``at_once`` it raises where the main thread stands: for work whose every piece commits itself.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: object) -> None:
        stop.requested = True
        if at_once:
            stop.raise_if_requested()

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
