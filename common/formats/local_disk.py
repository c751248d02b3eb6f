"""Whole files and ranges of files on a local disk, without the copies that a request to a key-value store takes.

Files are written as TensorStore's ``file`` driver does it, under the same locks, so that both may write one folder.
"""

import errno
import fcntl
import os
import struct
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
from jaxtyping import UInt8

_PIECES = 512  # a call; the system's limit is 1,024
_WHOLE_FILE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def can_write() -> bool:
    """Whether this system has the locks that TensorStore takes."""
    return sys.platform == "linux"


def make_folders(folder: Path) -> list[Path]:
    """Make ``folder`` and those above it that are missing.

    Returns:
        Those that have a new entry, from the lowest up: it lasts once they are given to ``sync_folder``.

    Raises:
        OSError: as the system says it.
    """
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for place in reversed(missing):
        place.mkdir(exist_ok=True)  # another may have made it meanwhile
    return [place.parent for place in missing]


def sync_folder(folder: Path) -> None:
    """Return once the names in ``folder`` are on the disk: a file that is there without its name is lost."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def file_version(path: Path) -> bytes:
    """What tells whether the file ``path`` has been replaced since, by one that takes its locks; none has one, too."""
    found = _stat(path)
    return b"" if found is None else f"{found.st_dev} {found.st_ino} {found.st_mtime_ns}".encode()


def write_file(path: Path, pieces: Sequence[UInt8[np.ndarray, " bytes"]], over: bytes | None = None) -> bool:
    """Write ``pieces`` one after the other as the file ``path``, whole and durable.

    They go to ``path.__lock``, which takes the place of ``path`` once it is on the disk. Folders that are missing are
    made, and are on the disk with it.

    Args:
        path: of the file.
        pieces: of its bytes.
        over: the version of the file that may be replaced; None replaces whatever is there.

    Returns:
        Whether it was written: False where there is another version.

    Raises:
        OSError: as the system says it.
    """
    grown = make_folders(path.parent)
    beside = path.with_name(f"{path.name}.__lock")
    file = _locked(beside)
    try:
        if over is not None and file_version(path) != over:
            beside.unlink()
            return False
        os.ftruncate(file, 0)
        filled = [piece.data for piece in pieces if piece.nbytes]
        for start in range(0, len(filled), _PIECES):
            _write_all(file, filled[start : start + _PIECES])
        os.fsync(file)
        os.rename(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)
    for folder in (path.parent, *grown):
        sync_folder(folder)
    return True


def stale_lock_bytes(path: Path, *, delete: bool) -> int | None:
    """The size of a ``*.__lock`` that a writer left which has died, which is deleted if told; None where one holds it.

    Whoever waits for the lock meanwhile finds its file gone and makes another.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        if _stat(path) is None:  # its writer has just given it its name
            return None
        if delete:
            path.unlink()
        return os.fstat(file).st_size
    except BlockingIOError:
        return None
    finally:
        os.close(file)


def _locked(path: Path) -> int:
    """``path`` opened for writing by this process alone."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLKW, _WHOLE_FILE)
            here = os.fstat(file)
            if (there := _stat(path)) is not None and (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                return file
        except OSError:
            os.close(file)
            raise
        os.close(file)  # whoever held it has renamed it meanwhile


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _write_all(file: int, pieces: list[memoryview]) -> None:
    while pieces:
        written = os.writev(file, pieces)
        if written == 0:
            raise OSError(errno.EIO, "nothing was written")
        while pieces and written >= pieces[0].nbytes:
            written -= pieces.pop(0).nbytes
        if pieces:
            pieces[0] = pieces[0][written:]


class DiskReads:
    """Ranges of the files in ``folder``, read by some threads into memory that is used again."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder = folder
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="disk-reads")
        self._free: dict[int, list[np.ndarray]] = {}
        self._lock = Lock()

    def start(self, name: str, place: slice) -> "Future[UInt8[np.ndarray, ' bytes'] | None]":
        """Begin to read bytes ``place`` of file ``name``: fewer where it is shorter, None where there is none."""
        return self._threads.submit(self._read, name, place)

    def give_back(self, data: UInt8[np.ndarray, " bytes"]) -> None:
        """Let the memory of what was read be used again."""
        whole = data if data.base is None else data.base
        with self._lock:
            self._free.setdefault(whole.nbytes, []).append(whole)

    def _read(self, name: str, place: slice) -> np.ndarray | None:
        size = place.stop - place.start
        with self._lock:
            free = self._free.get(size)
            buffer = free.pop() if free else np.empty(size, np.uint8)
        try:
            file = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self.give_back(buffer)
            return None
        try:
            done = 0
            while done < size and (count := os.preadv(file, [buffer[done:].data], place.start + done)):
                done += count
        finally:
            os.close(file)
        return buffer[:done]
