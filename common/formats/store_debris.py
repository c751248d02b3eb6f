"""What lies in the folder of an activation store that no reader needs and no run goes on from, found and deleted.

An unfinished store has shards without a ledger entry, which somebody may be writing. Their claims tell: a shard that
has none, or one that nobody has moved on for its lease, is nobody's. A stage that takes no claims shows no life: its
unfinished shards are debris only where the caller knows that it does not run.

Everything is deleted only while it is what was looked at, and a shard's objects while this process holds the claim,
so that a worker that comes meanwhile loses nothing.
"""

import json
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from saex_pipe.common.formats.claims import claim_name
from saex_pipe.common.formats.folder import Folder, Stamped
from saex_pipe.common.formats.followed_store import freed_below
from saex_pipe.common.formats.store_info import StoreInfo

_ARRAYS = ("acts/", "scales/", "keep/", "tokens/")
_WORK = ("claims/", "parts/", "readers/", "workers/")  # of no use once the store is finished
_LEASE_SECONDS = 120.0  # far more than the few objects of one shard take to delete


class Piece(NamedTuple):
    """An object as it was looked at."""

    name: str
    generation: bytes
    bytes: int


class Debris(NamedTuple):
    """What was found: nobody's, nobody's any more by shard with the claim first, and what may be being written."""

    free: list[Piece]
    claimed: dict[int, list[Piece]]
    kept: list[Piece]

    @property
    def pieces(self) -> list[Piece]:
        """All that can go."""
        return [*self.free, *(piece for pieces in self.claimed.values() for piece in pieces if piece.bytes)]


def find_debris(folder: Folder, info: StoreInfo, *, finished: bool, stopped: bool, claiming: bool) -> Debris:
    """What in ``folder`` can go; where claims have a holder, it takes their lease to tell.

    Args:
        folder: of the store.
        info: what the store is made of.
        finished: whether it has its manifest.
        stopped: whether no worker runs any more, whatever the claims say.
        claiming: whether its stage writes no shard without a claim.
    """
    names, by_shard = _unneeded(folder, info, finished)
    free = _look(folder, names)
    objects = {shard: _look(folder, names) for shard, names in by_shard.items()}
    claims = {} if finished else _claims(folder)
    idle = _idle(folder, claims, stopped)
    unclaimed = {shard: folder.read_stamped(claim_name(shard)) for shard in objects if claiming and shard not in claims}
    done = set(folder.list("ledger/"))  # looked for last: what has been finished meanwhile stays
    claimed: dict[int, list[Piece]] = {shard: [claim] for shard, claim in idle.items()}
    kept: list[Piece] = []
    for shard, pieces in objects.items():
        if f"ledger/{shard:06d}.json" in done:
            continue
        if shard in idle:
            claimed[shard] += pieces
        elif shard in unclaimed and unclaimed[shard].data is None:  # nor claimed while the others were watched
            claimed[shard] = [Piece(claim_name(shard), unclaimed[shard].generation, 0), *pieces]
        elif stopped and shard not in claims:
            free += pieces
        else:
            kept += pieces
    return Debris(free, claimed, kept)


def _unneeded(folder: Folder, info: StoreInfo, finished: bool) -> tuple[list[str], dict[int, list[str]]]:
    """Names of what nobody asks for whoever runs, and of the objects of each shard that has no ledger entry."""
    layouts, shards = info.layouts(), range(len(info.tiling.shards(info.windows)))
    shard_of = {layout.shard_object(shard): shard for layout in layouts.values() for shard in shards}
    names, freed = folder.list(), freed_below(folder)
    needed = {f"{array}/zarr.json" for array in layouts}
    done = {name for name in names if name.startswith("ledger/")}
    free, unfinished = [], dict[int, list[str]]()
    for name in names:
        if finished and name.startswith(_WORK):
            free.append(name)
        elif name.startswith(_ARRAYS) and name.count("/") > 1 and name not in needed:
            shard = shard_of.get(name)
            if shard is None or shard < freed:  # of no array, or left where readers have freed it
                free.append(name)
            elif not finished and f"ledger/{shard:06d}.json" not in done:
                unfinished.setdefault(shard, []).append(name)
    return free, unfinished


def _look(folder: Folder, names: Sequence[str]) -> list[Piece]:
    found = ((name, folder.read_stamped(name)) for name in names)
    return [Piece(name, at.generation, len(at.data)) for name, at in found if at.data is not None]


def _claims(folder: Folder) -> dict[int, Stamped]:
    """The claims on shards; one that says how its shard was finished is what workers go on from, so it stands, too."""
    names = folder.list("claims/")
    found = {int(name[len("claims/") : -len(".json")]): folder.read_stamped(name) for name in names}
    return {shard: claim for shard, claim in found.items() if claim.data is not None}


def _idle(folder: Folder, claims: Mapping[int, Stamped], stopped: bool) -> dict[int, Piece]:
    """The claims that nobody holds, by shard."""
    states = {shard: json.loads(claim.data or b"{}") for shard, claim in claims.items()}
    leases = [state["lease_seconds"] for state in states.values() if state.get("worker")]
    if leases and not stopped:
        print(f"watching {len(leases)} claims for their lease of {max(leases):g} s", file=sys.stderr, flush=True)
        time.sleep(max(leases))
    found = {}
    for shard, state in states.items():
        name, (data, generation) = claim_name(shard), claims[shard]
        held = bool(state.get("worker")) and not stopped and folder.generation(name) != generation
        if "finished" not in state and not held:
            found[shard] = Piece(name, generation, len(data or b""))
    return found


def delete_debris(folder: Folder, debris: Debris) -> Iterator[Piece]:
    """Delete it, and say what has gone: not what has changed meanwhile."""
    yield from (piece for piece in debris.free if folder.delete_if(piece.name, piece.generation))
    own = json.dumps({"worker": f"prune-{uuid.uuid4().hex}", "lease_seconds": _LEASE_SECONDS, "beat": 0}).encode()
    for claim, *objects in debris.claimed.values():
        held = folder.write_if(claim.name, own, claim.generation)
        if held is None:
            continue
        yield from (piece for piece in objects if folder.delete_if(piece.name, piece.generation))
        if folder.delete_if(claim.name, held) and claim.bytes:
            yield claim
