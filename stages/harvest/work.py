"""Which shards this process makes: those of a fixed share, or those that no other worker holds at the moment."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

from saex_pipe.common.errors import ShareDone
from saex_pipe.common.formats.activations import ActivationWriter, Overtaken
from saex_pipe.common.formats.claims import Claims, Tenure
from saex_pipe.common.formats.followed_store import Room
from saex_pipe.common.formats.stage_output import StageOutput
from saex_pipe.common.preemption import StopRequest
from saex_pipe.common.worker import Share

_POLL_SECONDS = 2.0

Write = Callable[[Mapping[str, bytes]], dict[str, Any]]  # versions of the objects it may replace -> ledger entry


class Work(AbstractContextManager["Work"]):
    """The shards of this process, in rounds: a round ends where there is nothing to begin before others have moved on.

    Nothing is waited for within a round, since what others wait for may still be under way in it. Each shard is claimed
    first, also where nobody else should be at work: of two processes that make the same shard only one is believed.
    """

    def __init__(
        self,
        output: StageOutput,
        writer: ActivationWriter,
        *,
        worker: str,
        share: Share | None,
        lease_seconds: float,
        room: Room | None,
        stop: StopRequest,
    ) -> None:
        """``share`` is None for an elastic worker: it is done when all shards are."""
        self.shards = writer.info.tiling.shards(writer.info.windows)
        self.share = share or Share(0, 1)
        self._output, self._writer, self._room, self._stop = output, writer, room, stop
        self._mine = self.share.of(range(len(self.shards)))
        self._claims = Claims(output.folder, worker, lease_seconds, None if share is None else share.name)
        self._tenure = None if share is None else Tenure(output.folder, worker, share.name)
        self._before: dict[int, Mapping[str, bytes]] = {}  # objects of a shard as they were while it was this worker's
        self._open = ExitStack()

    def open_shards(self) -> list[int]:
        """Shards of this process that are not finished, by the ledger."""
        finished = self._output.finished_shards()
        return [shard for shard in self._mine if shard not in finished]

    def round(self) -> Iterator[int]:
        """Shards to make now, in ascending order."""
        for shard in self.open_shards():
            if self._room is not None and not self._room.has(shard):
                return
            if self._claims.holds(shard):
                continue
            if self._tenure is not None:
                self._tenure.check()
            if self._claims.claim(shard) and self._take(shard):
                yield shard

    def write(self, shard: int, write: Write) -> None:
        """Write a shard while it is this worker's; one that was taken over is left to who has it."""
        while self._claims.holds(shard):
            try:
                entry = write(self._before[shard])
            except Overtaken:  # by who held it before, or by who has it now
                self._take(shard)
                continue
            self._claims.commit(shard, entry)
            return

    def _take(self, shard: int) -> bool:
        """Note what the shard's objects are; the claim is confirmed afterwards, so that they are no later holder's."""
        self._before[shard] = self._writer.versions(self.shards[shard])
        return self._claims.confirm(shard)

    def wait(self) -> bool:
        """Whether there is another round, once there may be something to do in it."""
        if self._stop.requested or not self.open_shards():
            return False
        self._stop.raise_if_requested()
        time.sleep(_POLL_SECONDS)
        return not self._stop.requested

    def raise_if_shared(self) -> None:
        """Raise ``ShareDone`` where others still have shards to make."""
        finished = len(self._output.finished_shards())
        if finished < len(self.shards):
            raise ShareDone(
                f"worker {self.share.index}/{self.share.count}: its {len(self._mine)} shards are done; "
                f"{finished} of {len(self.shards)} are in all"
            )

    def __enter__(self) -> Self:
        if self._tenure is not None:
            self._open.enter_context(self._tenure)
        self._open.enter_context(self._claims)
        return self

    def __exit__(self, *exception: object) -> None:
        """Give back what is held."""
        self._open.close()
