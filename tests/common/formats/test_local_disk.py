"""Files written without TensorStore, next to files that it writes."""

import errno
import fcntl
import os
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from saex_pipe.common.formats import local_disk
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.local_disk import DiskReads, file_version, write_file

PIECES = [np.full(3, number % 256, np.uint8) for number in range(1500)]  # more than one call takes
DATA = b"".join(map(bytes, PIECES))


def test_a_file_is_its_pieces_one_after_the_other(tmp_path):
    write_file(tmp_path / "deep" / "er" / "file", PIECES)
    assert (tmp_path / "deep" / "er" / "file").read_bytes() == DATA
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["file"]


def test_a_file_may_be_empty(tmp_path):
    write_file(tmp_path / "file", [np.zeros(0, np.uint8)])
    assert (tmp_path / "file").read_bytes() == b""


def test_a_system_that_writes_a_little_at_a_time_is_asked_again(tmp_path, monkeypatch):
    whole = os.writev
    monkeypatch.setattr(os, "writev", lambda file, pieces: whole(file, [memoryview(pieces[0])[:2]]))
    write_file(tmp_path / "file", PIECES[:20])
    assert (tmp_path / "file").read_bytes() == DATA[:60]


def test_what_a_killed_writer_left_behind_is_not_part_of_the_file(tmp_path):
    (tmp_path / "file.__lock").write_bytes(b"x" * 10_000)
    write_file(tmp_path / "file", PIECES)
    assert (tmp_path / "file").read_bytes() == DATA
    assert not (tmp_path / "file.__lock").exists()


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    def full(file, pieces):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_file(tmp_path / "file", PIECES[:1])
    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "file", PIECES)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [DATA[:3]]


def test_a_file_is_replaced_only_where_it_is_the_version_that_may_be(tmp_path):
    path = tmp_path / "deep" / "file"
    absent = file_version(path)
    assert write_file(path, PIECES[:1], over=absent)
    first = file_version(path)
    assert not write_file(path, PIECES, over=absent)
    assert write_file(path, PIECES[:2], over=first)
    assert not write_file(path, PIECES, over=first)
    assert path.read_bytes() == DATA[:6]
    assert [name.name for name in path.parent.iterdir()] == ["file"], "a refused write leaves no lock"
    path.unlink()
    assert not write_file(path, PIECES, over=first)
    assert write_file(path, PIECES[:1], over=absent)


def test_of_writers_that_have_seen_the_same_version_one_replaces_it(tmp_path):
    path = tmp_path / "file"
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            write = partial(write_file, path, over=file_version(path))
            won = list(threads.map(write, ([piece] for piece in PIECES[:4])))
            assert sum(won) == 1
            assert path.read_bytes() == bytes(PIECES[won.index(True)])


def test_a_file_is_on_the_disk_before_its_name_and_then_the_names_of_its_folders(tmp_path, monkeypatch):
    """What a power cut leaves cannot be tested; that nothing is left to it can."""
    happened, fsync, rename, writev = [], os.fsync, os.rename, os.writev

    def record(what, call, path_of):
        def recorded(*arguments):
            path = path_of(*arguments)
            happened.append((what, "" if path == str(tmp_path) else path.removeprefix(f"{tmp_path}/")))
            return call(*arguments)

        return recorded

    def open_at(file, *_):
        return os.readlink(f"/proc/self/fd/{file}")

    monkeypatch.setattr(os, "writev", record("write", writev, open_at))
    monkeypatch.setattr(os, "fsync", record("sync", fsync, open_at))
    monkeypatch.setattr(os, "rename", record("rename", rename, lambda _, target: str(target)))
    (tmp_path / "acts").mkdir()
    write_file(tmp_path / "acts" / "c" / "0" / "file", PIECES[:3])
    assert happened == [
        ("write", "acts/c/0/file.__lock"),
        ("sync", "acts/c/0/file.__lock"),
        ("rename", "acts/c/0/file"),
        ("sync", "acts/c/0"),
        ("sync", "acts/c"),
        ("sync", "acts"),
    ]
    happened.clear()
    write_file(tmp_path / "acts" / "c" / "0" / "other", PIECES[:3])
    assert [place for what, place in happened if what == "sync"] == ["acts/c/0/other.__lock", "acts/c/0"]
    happened.clear()
    Folder(str(tmp_path)).make("new/er")
    assert happened == [("sync", "new"), ("sync", "")]


RACE = """
import sys
from pathlib import Path
import numpy as np
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.local_disk import write_file

place, mark = Path(sys.argv[1]), int(sys.argv[2])
data = np.full(100_000 + mark, mark, np.uint8)
for _ in range(60):
    if mark % 2:
        write_file(place / "deep" / "file", [data[:7], data[7:]])
    else:
        Folder(str(place / "deep")).objects.write("file", data.tobytes()).result()
"""


def test_processes_that_race_leave_the_whole_file_of_one_of_them(tmp_path):
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(mark)]) for mark in (1, 2, 3, 4)]
    file, seen = tmp_path / "deep" / "file", set()
    while any(writer.poll() is None for writer in writers):
        if file.exists():
            data = file.read_bytes()
            assert data == bytes(data[:1]) * (100_000 + data[0])
            seen.add(data[0])
    assert [writer.returncode for writer in writers] == [0] * 4
    assert len(seen) > 1, "they have not raced"
    assert [path.name for path in file.parent.iterdir()] == ["file"]


@pytest.mark.skipif(not local_disk.can_write(), reason="no open file description locks")
def test_tensorstore_and_we_wait_for_each_other(tmp_path):
    """Both write to the same file beside the real one: without a common lock they would mix their bytes."""
    lock = os.open(tmp_path / "file.__lock", os.O_RDWR | os.O_CREAT)
    fcntl.fcntl(lock, fcntl.F_OFD_SETLKW, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
    theirs = Folder(str(tmp_path)).objects.write("file", b"theirs")
    ours = threading.Thread(target=write_file, args=(tmp_path / "file", PIECES))
    ours.start()
    ours.join(0.3)
    assert ours.is_alive()
    assert not theirs.done()
    assert not (tmp_path / "file").exists()
    os.close(lock)
    ours.join()
    theirs.result()
    assert (tmp_path / "file").read_bytes() in (b"theirs", DATA)


def test_ranges_are_read_into_memory_that_is_used_again(tmp_path):
    (tmp_path / "file").write_bytes(DATA)
    reads = DiskReads(tmp_path, threads=2)
    first = reads.start("file", slice(30, 60)).result()
    assert bytes(first) == DATA[30:60]
    reads.give_back(first)
    second = reads.start("file", slice(60, 90)).result()
    assert bytes(second) == DATA[60:90]
    assert np.shares_memory(first, second)
    assert bytes(reads.start("file", slice(len(DATA) - 10, len(DATA) + 10)).result()) == DATA[-10:]
    assert reads.start("absent", slice(0, 4)).result() is None
