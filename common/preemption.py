"""SIGTERM means "the machine goes away": finish the work in hand, commit it, exit with status 75. Ctrl-C is as safe."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from saex_pipe.common.errors import PreemptedError


class StopRequest:
    """Whether a signal to stop has arrived; ``raise_if_requested`` is called where everything finished is committed."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def requested(self) -> bool:
        """Whether SIGTERM or SIGINT has arrived."""
        return self.signal is not None

    def raise_if_requested(self) -> None:
        """Raise PreemptedError (exit status 75) after SIGTERM, KeyboardInterrupt after SIGINT."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise PreemptedError("stopped by SIGTERM with everything finished committed; run the same command again")


_innermost: StopRequest | None = None  # of the blocks that the main thread is in


@contextmanager
def graceful_stop(
    *, at_once: bool = False, interrupts: Literal["raise", "hold", "leave"] = "raise"
) -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a ``StopRequest`` inside the block (in the main thread; elsewhere nothing changes).

    SIGTERM raises where the main thread stands only with ``at_once``: for work whose every piece commits itself.
    SIGINT does, unless ``interrupts`` holds the first one back for ``raise_if_stopping`` or leaves it to Python.
    Whatever becomes of an exception raised inside foreign code, the end of the block raises again.
    """
    global _innermost
    raise_if_stopping()
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: object) -> None:
        again, stop.signal = stop.requested, signum
        if again or (at_once if signum == signal.SIGTERM else interrupts == "raise"):
            stop.raise_if_requested()

    handled = (signal.SIGTERM,) if interrupts == "leave" else (signal.SIGTERM, signal.SIGINT)
    previous = {signum: signal.signal(signum, handle) for signum in handled}
    outer, _innermost = _innermost, stop
    try:
        yield stop
        stop.raise_if_requested()
    finally:
        _innermost = outer
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def raise_if_stopping() -> None:
    """Raise as the innermost ``graceful_stop`` would, for work that is handed to foreign code piece by piece."""
    if _innermost is not None:
        _innermost.raise_if_requested()
