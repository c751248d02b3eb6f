"""Shards shared out among workers that come and go, by compare-and-swap on one object a shard.

``claims/N.json`` is absent, then ``{"worker", "lease_seconds", "beat"}``, in the end ``{"finished": ledger entry}``;
it is absent again when it was given back.
A worker that claims a shard moves the beat on; a claim whose object stays the same for its lease, by the clock of
whoever looks, has expired and may be taken over. Nobody compares clocks: they decide how long to wait, never who is
right. Right is who swaps the claim to ``finished``, and only its holder can; a holder whose claim was taken over finds
out when its swap fails. The shard's data are written on the condition that they are still what they were at a moment
from which on the claim is known to have been the writer's own (``confirm``): whoever takes the claim over later
writes them anew, so that a late writer cannot touch what a later holder has committed. (On S3 an object of the same
bytes is the same: there a writer that is late could replace bytes that had been there before, too. Their checksums
would no longer be the ledger's, which every reader checks.)

A worker with a fixed share has its shards to itself: what the claims of its share say is of an earlier process of the
same share, mostly one that has died, so they are taken over at once. Should that process live, as on a machine that is
slow to go, then of the two the one that started last goes on (``Tenure``).
"""

import json
import threading
import time
from typing import Any, Self

from saex_pipe.common.errors import SaexError, Superseded
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import commit_shard

_BEATS_PER_LEASE = 3


class Claims:
    """The claims of one worker on the shards of ``folder``; in a ``with`` block a thread keeps them alive.

    ``worker`` must be a name that no other process has; ``share`` names the shards that it makes alone, if it does.
    """

    def __init__(self, folder: Folder, worker: str, lease_seconds: float, share: str | None = None) -> None:
        self._folder = folder
        self._own = {"worker": worker, "lease_seconds": lease_seconds} | ({"share": share} if share else {})
        self._share = share
        self._lease_seconds = lease_seconds
        self._held: dict[int, bytes] = {}  # shard to the generation of its claim
        self._beat = 0
        self._others: dict[int, tuple[bytes, float]] = {}  # generation, and when it was first seen
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def claim(self, shard: int) -> bool:
        """Whether ``shard`` is this worker's now."""
        found = self._folder.read_stamped(claim_name(shard))
        state: dict[str, Any] = {} if found.data is None else json.loads(found.data)
        if "finished" in state:
            commit_shard(self._folder, shard, state["finished"])  # again, should its worker have died before
            return False
        is_others = state.get("worker") is not None and not self._is_predecessor(state)
        if is_others and not self._has_expired(shard, found.generation, state["lease_seconds"]):
            return False
        with self._lock:
            generation = self._folder.write_if(claim_name(shard), self._body(), found.generation)
            if generation is not None:
                self._held[shard] = generation
        return generation is not None

    def holds(self, shard: int) -> bool:
        """Whether, as far as this worker knows, the shard is still its own."""
        return shard in self._held

    def commit(self, shard: int, entry: dict[str, Any]) -> bool:
        """Record ``shard`` as finished. False where another worker has taken it over: then nothing has changed."""
        with self._lock:
            generation = self._held.pop(shard, None)
            finished = json.dumps({"finished": entry}, sort_keys=True).encode()
            if generation is None or self._folder.write_if(claim_name(shard), finished, generation) is None:
                return False
        commit_shard(self._folder, shard, entry)
        return True

    def renew(self) -> None:
        """Move the beat of every claim on; those that another worker has taken over are held no more."""
        for shard in list(self._held):
            self.confirm(shard)

    def confirm(self, shard: int) -> bool:
        """Whether the shard is this worker's and was so all the time since it was claimed; moves its beat on."""
        with self._lock:
            if shard not in self._held:
                return False
            generation = self._folder.write_if(claim_name(shard), self._body(), self._held[shard])
            if generation is None:
                del self._held[shard]
            else:
                self._held[shard] = generation
        return generation is not None

    def _is_predecessor(self, state: dict[str, Any]) -> bool:
        return self._share is not None and state.get("share") == self._share

    def _has_expired(self, shard: int, generation: bytes, lease_seconds: float) -> bool:
        now = time.monotonic()
        seen, since = self._others.get(shard, (b"", now))
        if seen != generation:
            self._others[shard] = generation, now
            return False
        return now - since >= lease_seconds

    def _body(self) -> bytes:
        self._beat += 1
        return json.dumps(self._own | {"beat": self._beat}, sort_keys=True).encode()

    def _keep(self) -> None:
        while not self._done.wait(self._lease_seconds / _BEATS_PER_LEASE):
            try:
                self.renew()
            except SaexError:
                continue  # a store that does not answer now may do so before the lease is over

    def __enter__(self) -> Self:
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give back what was claimed and not finished."""
        self._done.set()
        self._keeper.join()
        with self._lock:
            for shard, generation in self._held.items():
                self._folder.delete_if(claim_name(shard), generation)
            self._held.clear()


class Tenure:
    """Which of the processes of one share goes on: the one that started last, by its name in ``workers/SHARE.json``.

    Every process writes its name before it claims anything, and looks before each claim whether it still stands there.
    Claims alone would keep the store right, but two processes could go on taking the same shards from each other.
    """

    def __init__(self, folder: Folder, worker: str, share: str) -> None:
        self._folder, self._share, self._name = folder, share, f"workers/{share}.json"
        self._own = json.dumps({"worker": worker}).encode()
        folder.write(self._name, self._own)

    def check(self) -> None:
        """Raise ``Superseded`` where another process has started on this share since, and has not stopped."""
        found = self._folder.read_stamped(self._name)
        if found.data is None and self._folder.write_if(self._name, self._own, found.generation) is not None:
            return
        if found.data != self._own:
            other = "another process" if found.data is None else json.loads(found.data)["worker"]
            raise Superseded(
                f"{self._folder.uri}: {other} has started on the same share ({self._share}) and goes on with it; this "
                "process stops, and nothing is lost"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no trace."""
        found = self._folder.read_stamped(self._name)
        if found.data == self._own:
            self._folder.delete_if(self._name, found.generation)


def claim_name(shard: int) -> str:
    """Of the object that holds the claim on ``shard``."""
    return f"claims/{shard:06d}.json"
