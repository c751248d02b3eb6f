"""Progress as people and programs see it: a bar on a terminal, plain lines elsewhere, JSONL beside the output."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

_PLAIN_LINE_SECONDS = 10.0  # between two lines where the output is not a terminal
_EVENT_SECONDS = 1.0  # between two JSONL events
_LEAST_EVENTS = 200  # of work whose terms are a curve, however short it is
_WATCH_SECONDS = 0.5  # between two looks into a folder that workers fill
_REMOTE_FLUSH_SECONDS = 60.0  # an object store cannot append: the whole log is written again


class EventLog(Protocol):
    """Something that keeps events."""

    def event(self, **values: Any) -> None:
        """Record one event."""


class MetricsLog:
    """Appends events to a local ``file``. Where there is none, the object is written whole through ``write_whole``,
    behind what an earlier run left in it (``read_whole``).
    """

    def __init__(
        self, file: Path | None, write_whole: Callable[[bytes], None], read_whole: Callable[[], bytes | None]
    ) -> None:
        self._file = file
        self._write_whole, self._read_whole = write_whole, read_whole
        self._written: bytes | None = None  # the object so far, None while it has not been read
        self._lines: list[str] = []  # still held back
        self._flushed = time.monotonic()

    def event(self, **values: Any) -> None:
        """Record one event; ``time`` (seconds since 1970, UTC) is added."""
        self._lines.append(json.dumps({"time": round(time.time(), 3), **values}))
        if self._file is not None or time.monotonic() - self._flushed > _REMOTE_FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        text = "".join(f"{line}\n" for line in self._lines)
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(text)
        else:
            if self._written is None:
                self._written = self._read_whole() or b""
            self._write_whole(self._written + text.encode())
            self._written += text.encode()
        self._lines.clear()

    def close(self) -> None:
        """Write what is still held back."""
        if self._lines:
            self._flush()


class Progress:
    """Counts one long piece of work in ``unit``; see ``progress``."""

    def __init__(self, label: str, total: int, unit: str, done: int, log: EventLog | None, bar: Any) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = done
        self.this_run = 0  # done since the process started: resumed work does not count towards rates
        self.bytes = 0
        self.waiting_seconds = 0.0  # spent waiting for input
        self.start = time.monotonic()
        self._log, self._bar = log, bar
        self._last_event = self._last_line = self.start
        self._logged = done
        self._note = ""  # the last terms

    def advance(self, amount: int, *, bytes: int = 0, waiting_seconds: float = 0.0, **terms: float) -> None:
        """Count ``amount`` more; ``terms`` (loss terms and the like) go to the log and the bar."""
        self.done += amount
        self.this_run += amount
        self.bytes += bytes
        self.waiting_seconds += waiting_seconds
        now = time.monotonic()
        if terms:
            self._note = " ".join(f"{name}={value:.4g}" for name, value in terms.items())
        if self._bar is not None:
            self._bar(self.done, f"{self._rate(now)} {self._note}")
        elif now - self._last_line > _PLAIN_LINE_SECONDS:
            self._last_line = now
            left = (now - self.start) * (self.total - self.done) / max(self.this_run, 1)
            share = f"{self.done:,} of {self.total:,} {self.unit} ({self.done / max(self.total, 1):.0%})"
            line = f"{self.label}: {share}, {self._rate(now)}, {left:.0f} s left {self._note}"
            print(line.rstrip(), file=sys.stderr)
        if self._log is not None and self._is_due(now, bool(terms)):
            self._last_event, self._logged = now, self.done
            seconds = max(now - self.start, 1e-9)
            self._log.event(
                work=self.label,
                **{self.unit: self.done, f"{self.unit}_per_second": round(self.this_run / seconds, 1)},
                bytes_per_second=round(self.bytes / seconds),
                waiting_seconds=round(self.waiting_seconds, 3),
                waiting_share=round(self.waiting_seconds / seconds, 4),
                **terms,
            )

    def _is_due(self, now: float, has_terms: bool) -> bool:
        on_the_curve = has_terms and self.done - self._logged >= self.total / _LEAST_EVENTS
        return now - self._last_event > _EVENT_SECONDS or self.done >= self.total or on_the_curve

    def _rate(self, now: float) -> str:
        seconds = max(now - self.start, 1e-9)
        waited = f", {self.waiting_seconds / seconds:.0%} waiting for input" if self.waiting_seconds else ""
        return f"{self.this_run / seconds:,.0f} {self.unit}/s{waited}"


@contextmanager
def progress(label: str, total: int, unit: str, *, done: int = 0, log: EventLog | None = None) -> Iterator[Progress]:
    """Show the progress of ``total`` ``unit`` of work, ``done`` of which an earlier run has finished."""
    if not sys.stderr.isatty():
        yield Progress(label, total, unit, done, log, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as rich_bar:
        task = rich_bar.add_task(label, total=total, completed=done, note="")
        yield Progress(label, total, unit, done, log, lambda now, note: rich_bar.update(task, completed=now, note=note))


@contextmanager
def watched_progress(
    label: str,
    names: Sequence[str],
    unit: str,
    list_names: Callable[[str], Sequence[str]],
    prefix: str,
    log: MetricsLog,
) -> Iterator[None]:
    """Progress of workers that only meet in a folder: how many of ``names`` ``list_names(prefix)`` shows."""

    def present() -> int:
        return len({*names} & {*list_names(prefix)})

    with progress(label, len(names), unit, done=present(), log=log) as bar:
        finished = threading.Event()

        def watch() -> None:
            while not finished.wait(_WATCH_SECONDS):
                bar.advance(present() - bar.done)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()
            bar.advance(present() - bar.done)
