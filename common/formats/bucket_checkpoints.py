"""Checkpoints in a bucket: what Orbax leaves on a disk of each process of a training, object by object.

``state/STEP/...``             the files of a checkpoint, each from the process that has it
``state/STEP/parts/P-of-N``    written last by process P of N: the names of its files. With all N it is whole

Each process saves its own share of the arrays to a disk of its own, as a database; joined, the databases are the
checkpoint, for any number of processes. So nothing but the bucket needs to be shared, and no object holds a whole
state, which S3 would refuse beyond 5 GB.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils

from saex_pipe.common.errors import SaexError
from saex_pipe.common.formats.folder import Folder

_STATE = "state/"
_FILE = re.compile(r"state/(\d+)/.+")
_PART = re.compile(r"state/(\d+)/parts/(\d+)-of-(\d+)")
_DATABASES = "ocdbt.process_*"  # Orbax' name of what one process has saved of the arrays
_REQUESTS = 4  # at once, each of which holds a file, of up to 2 GiB, and a copy of it


class BucketCheckpoints:
    """The checkpoints in ``state/`` of ``folder``, of which the latest ``kept`` stay; ``place`` is on a local disk.

    All processes must open it together. What is not whole then goes.
    """

    def __init__(self, folder: Folder, place: Path, kept: int) -> None:
        self._folder = Folder(folder.uri)  # that of a process which writes no results may refuse to write
        self._place, self._kept = place, kept
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._uploads = ThreadPoolExecutor(1)
        self._upload: Future[None] | None = None
        self.steps = self._agreed(self._whole()[-kept:] if self._process == 0 else [])  # there from the start
        if self._process == 0:
            for step in self._all() - set(self.steps):
                self._delete(step)

    def upload(self, step: int, finish: Callable[[], None]) -> None:
        """Start to upload ``step`` from ``place`` once ``finish`` has returned; then earlier ones are deleted."""
        self.wait()
        self._upload = self._uploads.submit(self._keep, step, finish)

    def wait(self) -> None:
        """Return once what this process began to upload is there."""
        if self._upload is not None:
            self._upload.result()

    def download(self, step: int) -> None:
        """Fetch a checkpoint to ``place``.

        Raises:
            SaexError: the bucket has lost a part of it.
        """
        parts = self._folder.read_many(self._folder.list(f"{_at(step)}parts/"))
        names = [name for data in parts.values() for name in json.loads(data)]

        def fetch(name: str) -> None:
            data = self._folder.read(name)
            if data is None:
                where = f"{self._folder.uri}/{_at(step)}"
                raise SaexError(f"{self._folder.uri}/{name} is gone; delete {where} to go on from the save before")
            path = self._place / str(step) / name.removeprefix(_at(step))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

        with ThreadPoolExecutor(_REQUESTS) as requests:
            list(requests.map(fetch, names))
        for place in {path.parent for path in (self._place / str(step)).rglob(_DATABASES)}:
            _join(place)

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints after ``step``, which training is about to go through again."""
        if self._process == 0:
            for later in (found for found in self._all() if found > step):
                self._delete(later)
        self.steps = [found for found in self.steps if found <= step]

    def _agreed(self, steps: list[int]) -> list[int]:
        """What the first process sees, on all of them."""
        if self._processes == 1:
            return steps
        padded = np.array([-1] * (self._kept - len(steps)) + steps, np.int32)
        return [int(step) for step in multihost_utils.broadcast_one_to_all(padded) if step >= 0]

    def _keep(self, step: int, finish: Callable[[], None]) -> None:
        finish()
        written = self._place / str(step)
        files = sorted(path for path in written.rglob("*") if path.is_file())
        if self._process > 0:  # the first one has what describes the arrays
            files = [path for path in files if any(parent.match(_DATABASES) for parent in path.parents)]
        names = [f"{_at(step)}{path.relative_to(written).as_posix()}" for path in files]
        with ThreadPoolExecutor(_REQUESTS) as requests:
            list(requests.map(lambda name, path: self._folder.write(name, path.read_bytes()), names, files))
        part = f"{_at(step)}parts/{self._process}-of-{self._processes}"
        self._folder.write(part, json.dumps(names).encode())
        for old in self._whole()[: -self._kept]:  # by whoever is the last to write its part
            self._delete(old)

    def _whole(self) -> list[int]:
        """Steps of which all parts are there, ascending."""
        found: dict[tuple[int, int], set[int]] = defaultdict(set)
        for name in self._folder.list(_STATE):
            if part := _PART.fullmatch(name):
                step, process, processes = map(int, part.groups())
                found[step, processes].add(process)
        return sorted({step for (step, processes), there in found.items() if len(there) == processes})

    def _all(self) -> set[int]:
        """Steps of which anything is there."""
        return {int(file[1]) for name in self._folder.list(_STATE) if (file := _FILE.fullmatch(name))}

    def _delete(self, step: int) -> None:
        self._folder.delete(f"{_at(step)}parts/")  # first: what is half gone must not count as whole
        self._folder.delete(_at(step))


def _at(step: int) -> str:
    return f"{_STATE}{step:012d}/"


def _join(place: Path) -> None:
    """Make one database of those that the processes wrote, by reference to their files."""
    context = ts.Context()

    def opened(folder: Path) -> ts.KvStore:
        spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
        return ts.KvStore.open(spec, context=context).result()

    with ts.Transaction(atomic=True) as transaction:
        whole = opened(place).with_transaction(transaction)
        for database in sorted(place.glob(_DATABASES)):
            opened(database).experimental_copy_range_to(whole).result()
