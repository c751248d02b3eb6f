"""The folder that fetched resources are kept in: whole entries only, however a process ends or however many run.

A new entry is made in a temporary folder beside its final place and renamed into it. Whoever makes an entry
holds a lock on its key; the kernel drops the lock of a killed process, so a temporary folder whose lock is
free belongs to nobody and can be removed.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, TYPE_CHECKING, NamedTuple, Self

from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.split_file import part_names

if TYPE_CHECKING:
    import rich.progress

BLOCK_BYTES = 1 << 20
PLAIN_LINE_SECONDS = 10.0
POLL_SECONDS = 0.1
PARTS = "parts"  # the folder that the parts of a split file are kept in
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
BAD_DOWNLOAD = "nothing was kept; fetch it again, or correct the checksum if the file was replaced on purpose"


class Resource(NamedTuple):
    """A URI taken apart."""

    uri: str  # without the checksum
    scheme: str
    rest: str  # what follows scheme://
    sha256: str | None


def file_name(resource: Resource) -> str:
    """The last part of the resource's path; an ``InputError`` where that is not the name of a file."""
    path = PurePosixPath(resource.rest)
    if not path.name or ".." in path.parts:
        raise InputError(f"{resource.uri} names no file", "end it with the path of a file, without '..'")
    return path.name


def parts_of(resource: Resource) -> list[Resource]:
    """The resource itself; of a part of a split file all parts, in order, which belong beside each other."""
    name = PurePosixPath(resource.rest).name
    parts = part_names(name)
    if len(parts) == 1 or not resource.uri.endswith(name):
        return [resource]
    return [
        Resource(resource.uri.removesuffix(name) + part, resource.scheme, resource.rest.removesuffix(name) + part, None)
        for part in parts
    ]


def cache_key(resource: Resource, version: str = "") -> str:
    """What an entry is kept under: its checksum where given, else a digest of URI and ``version``."""
    return resource.sha256 or hashlib.sha256(f"{resource.uri}\n{version}".encode()).hexdigest()


def check_sha256(resource: Resource, actual: str, remedy: str) -> None:
    """Raise ``InputError`` unless ``actual`` is the checksum that was asked for, if any was."""
    if resource.sha256 and actual != resource.sha256:
        raise InputError(f"{resource.uri} has sha256 {actual}, asked for was {resource.sha256}", remedy)


def cache_folder() -> Path:
    """The folder fetched resources are kept in: ``SAEX_CACHE``, else the user's cache folder. Not created here."""
    chosen = os.environ.get("SAEX_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("saex-pipe"))


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn an ``OSError`` met while fetching ``uri`` into one line that says what to do."""
    try:
        yield
    except SaexError:
        raise
    except OSError as error:
        where, reason = error.filename, error.strerror or str(error)
        if error.errno in NO_SPACE:
            raise InputError(
                f"{uri} does not fit: no space left for {cache_folder()}",
                "free some space or point SAEX_CACHE at another disk",
            ) from error
        if in_cache(where):
            raise InputError(
                f"{uri} cannot be kept: {where}: {reason}", "point SAEX_CACHE at a folder that you may write to"
            ) from error
        raise InputError(f"{uri} cannot be read: {where or uri}: {reason}", "check path and permissions") from error


def in_cache(filename: object) -> bool:
    """Whether an ``OSError.filename`` is the cache folder, inside it, or one of the folders it lies in."""
    if not isinstance(filename, str | os.PathLike):
        return False
    cache, path = cache_folder().resolve(), Path(filename).resolve()
    return path == cache or cache in path.parents or path in cache.parents


def say(line: str, *, show: bool = True) -> None:
    """Print a plain line on stderr; stdout is for results."""
    if show:
        print(line, file=sys.stderr, flush=True)


def entry(key: str, name: str, make: Callable[[Path], Path], *, progress: bool) -> Path:
    """The file or folder ``name`` kept under ``key``; where there is none yet, ``make(temp)`` makes it.

    ``make`` gets an empty folder on the same file system and returns the finished file or folder inside it,
    already on disk. What it leaves when it raises or is killed is never taken for whole. Of several processes
    that want the same key, one makes it and the others wait for it.
    """
    shelf = cache_folder() / "fetched"
    target = shelf / key / name
    if target.exists():
        return target
    shelf.mkdir(parents=True, exist_ok=True)
    with _locked(shelf, key, progress):
        if target.exists():  # made by the process that held the lock
            return target
        _remove_abandoned(shelf, key)
        temp = Path(tempfile.mkdtemp(prefix=f"{key}.tmp-", dir=shelf))
        try:
            made = make(temp)
            target.parent.mkdir(exist_ok=True)
            os.replace(made, target)
            _sync_folder(target.parent)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    return target


def file_entry(resource: Resource, version: str, make: Callable[[Path], Path], *, progress: bool) -> Path:
    """The ``entry`` of a file; of a part of a split one, ``make`` returns a folder ``PARTS`` with all of them."""
    parts, name = parts_of(resource), file_name(resource)
    if len(parts) == 1:
        return entry(cache_key(resource, version), name, make, progress=progress)
    return entry(cache_key(parts[0], version), PARTS, make, progress=progress) / name


@contextmanager
def _locked(shelf: Path, key: str, progress: bool) -> Iterator[None]:
    with open(shelf / f"{key}.lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that is fetching the same", show=progress)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_abandoned(shelf: Path, own_key: str) -> None:
    """Remove what killed processes left. The caller holds the lock of ``own_key``."""
    for temp in shelf.glob("*.tmp-*"):
        key = temp.name.rsplit(".tmp-", 1)[0]
        if key == own_key:
            shutil.rmtree(temp, ignore_errors=True)
            continue
        with open(shelf / f"{key}.lock", "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # somebody is at work on it
            shutil.rmtree(temp, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temp = tempfile.mkstemp(prefix=f"{path.name}.tmp-", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temp, path)
    except BaseException:
        os.unlink(temp)
        raise


def copy_to_disk(stream: IO[bytes], target: Path, report: Callable[[int], None] | None = None) -> str:
    """Copy ``stream`` to ``target``, force it to disk, and return the sha256 of what was copied.

    ``report`` gets the number of bytes copied so far.
    """
    digest = hashlib.sha256()
    done_bytes = 0
    with open(target, "wb") as file:
        while block := stream.read(BLOCK_BYTES):
            file.write(block)
            digest.update(block)
            done_bytes += len(block)
            if report:
                report(done_bytes)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _terminal_bar(label: str) -> "rich.progress.Progress":
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bar.add_task(label, total=None)
    return bar


class Progress:
    """Bytes fetched so far, on stderr: a bar on a terminal, otherwise plain lines at most every ten seconds."""

    def __init__(self, label: str, *, show: bool) -> None:
        self.label = label
        self.show = show
        self.total_bytes: int | None = None
        self.done_bytes = 0
        self._start = self._last_line = time.monotonic()
        self._bar = _terminal_bar(label) if show and sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        else:
            say(f"fetching {self.label}", show=self.show)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            say(f"fetched {self.label}: {self._amount()}", show=self.show)

    def update(self, done_bytes: int) -> None:
        """Show that ``done_bytes`` of ``total_bytes`` (None where unknown) are there."""
        self.done_bytes = max(done_bytes, self.done_bytes)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.done_bytes, total=self.total_bytes)
        elif time.monotonic() - self._last_line > PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            say(f"fetching {self.label}: {self._amount()}", show=self.show)

    @contextmanager
    def watching(self, measure: Callable[[], int]) -> Iterator[None]:
        """Update from ``measure()`` ten times a second, for a download that reports nothing itself."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(POLL_SECONDS):
                with suppress(OSError):  # a file may vanish while it is measured
                    self.update(measure())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
            with suppress(OSError):
                self.update(measure())
        finally:
            stop.set()
            thread.join()

    def _amount(self) -> str:
        of_total = f" of {self.total_bytes / 1e6:.1f}" if self.total_bytes else ""
        return f"{self.done_bytes / 1e6:.1f}{of_total} MB in {time.monotonic() - self._start:.1f} s"
