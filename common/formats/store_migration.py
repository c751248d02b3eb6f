"""An activation store of schema version 1 brought to version 2, where it stands.

Version 1 had one dtype, no checksum of each chunk in the ledger, and the rows of each chunk in the manifest. Its arrays
are those of version 2, so every object is read once and checked, and the activations stay where they are. What is
written replaces whole objects: ledger entries first, the manifest last. Stopped in between, the store is still one of
version 1, and the next run goes on with the entries that are left.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import google_crc32c
import numpy as np

from saex_pipe.common.config import StageConfig, canonical_digest
from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.activations import CALIBRATION, SCHEMA_VERSION, ActivationWriter, finish_contents
from saex_pipe.common.formats.chunk_index import checksum_text
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import MANIFEST, STARTED, Manifest, commit_shard
from saex_pipe.common.formats.shard import CHECKSUM_BYTES, ArrayLayout
from saex_pipe.common.formats.statistics import floats_to_text
from saex_pipe.common.formats.store_info import KEEP, TOKENS, StoreInfo, acts_array

OLD_VERSION = 1
_OLD_WRITERS = ("harvest", "toy")
_PLACE = np.dtype([("offset", "<u8"), ("size", "<u8")])


@dataclass(frozen=True)
class Migration:
    """A store of version 1, and what it will be made of."""

    folder: Folder
    manifest: Manifest
    info: StoreInfo

    @staticmethod
    def of(uri: str) -> "Migration":
        """That of the finished store at ``uri``; an InputError where that is not of version 1."""
        folder = Folder(uri)
        manifest = Manifest.read(folder)
        if manifest is not None and manifest.schema_version == SCHEMA_VERSION:
            raise InputError(f"{uri} is of version {SCHEMA_VERSION} already", "use it as it is")
        manifest = Manifest.require(uri, _OLD_WRITERS, OLD_VERSION)
        contents = manifest.contents
        dtypes = dict.fromkeys(contents["taps"], contents["dtype"])
        return Migration(folder, manifest, StoreInfo.from_json(contents | {"dtypes": dtypes, "channels": {}}))

    @property
    def shards(self) -> list[range]:
        """The windows of each shard."""
        return self.info.tiling.shards(self.info.windows)

    def bring_shards(self, jobs: int) -> Iterator[int]:
        """Check each shard and bring its ledger entry to version 2, ``jobs`` of them at once; their numbers, in order.

        Raises:
            SaexError: a shard is missing or is not what was written.
        """
        with ThreadPoolExecutor(jobs) as pool:
            pending = (pool.submit(self._bring_shard, shard) for shard in range(len(self.shards)))
            started = list(islice(pending, jobs))
            while started:
                yield started.pop(0).result()
                started += islice(pending, 1)

    def finish(self, config: StageConfig) -> Manifest:
        """Write what is told of the store as such, the manifest last. All shards must have been brought.

        ``config`` is that of the manifest as the stage takes it now: the digest becomes the one of a store that the
        stage writes today, so that the stage finds its work done, and repairs can go on from it.
        """
        ActivationWriter(self.folder, self.info)  # writes what describes the store; its arrays must be there
        limits = self.info.row_policy.norm_limits
        if limits is not None:
            calibration = {"norm_limits": dict(limits), "channels": {}}
            self.folder.write(CALIBRATION, json.dumps(calibration, sort_keys=True).encode())
        ledger = {shard: self._entry(shard) for shard in range(len(self.shards))}
        contents = finish_contents(self.folder, self.info, ledger)
        fields = self.manifest.fingerprint | config.result_fields() | {"schema_version": SCHEMA_VERSION}
        self.folder.write(STARTED, json.dumps(fields, sort_keys=True).encode())
        manifest = replace(
            self.manifest,
            schema_version=SCHEMA_VERSION,
            digest=canonical_digest(fields),
            fingerprint=fields,
            config=config.model_dump(mode="json"),
            contents=contents,
        )
        self.folder.write(MANIFEST, json.dumps(manifest.__dict__, indent=1, sort_keys=True).encode())
        return manifest

    def _entry(self, shard: int) -> dict[str, Any]:
        name = f"ledger/{shard:06d}.json"
        try:
            return dict(json.loads(self.folder.read(name) or b""))
        except (ValueError, TypeError):
            raise self._lost(name, "is missing or damaged") from None

    def _bring_shard(self, shard: int) -> int:
        old = self._entry(shard)
        if "checksums" in old:  # by an earlier run
            return shard
        checksums, bodies = {}, {}
        for layout in self.info.layouts().values():
            chunks = self._chunks(layout, shard)
            own = np.array([int.from_bytes(chunk[-CHECKSUM_BYTES:], "little") for chunk in chunks], np.uint32)
            checksums[layout.name] = checksum_text(own)
            size = len(self.shards[shard]) * (layout.chunk_bytes // self.info.tiling.chunk_windows)
            body = b"".join(memoryview(chunk)[:-CHECKSUM_BYTES] for chunk in chunks)[:size]
            if layout.name in (TOKENS, KEEP):
                bodies[layout.name] = np.frombuffer(body, layout.dtype).reshape(-1, *layout.shape[1:])
                continue
            tap = next(tap for tap in self.info.taps if acts_array(tap) == layout.name)
            if zlib.crc32(body) != old["crc32"][tap]:
                raise self._lost(layout.shard_object(shard), "is not what was written there")
        self._check_rows(shard, bodies[KEEP], old)
        commit_shard(
            self.folder,
            shard,
            {name: old[name] for name in ("windows", "rows", "rows_per_chunk")}
            | {"outliers": self._outliers(bodies[TOKENS], bodies[KEEP]), "tap_outliers": {}}
            | {"checksums": checksums, "added_error": {}}
            | {"statistics": {tap: _statistics(found) for tap, found in old["statistics"].items()}},
        )
        return shard

    def _chunks(self, layout: ArrayLayout, shard: int) -> list[bytes]:
        """Each chunk of a shard with its checksum, which fits; a shard that has them elsewhere is written anew."""
        name = layout.shard_object(shard)
        data = self.folder.read(name)
        if data is None:
            raise self._lost(name, "is missing")
        number = -(-len(self.shards[shard]) // layout.tiling.chunk_windows)
        index_bytes = layout.tiling.chunks_per_shard * _PLACE.itemsize + CHECKSUM_BYTES
        index = data[-index_bytes:]
        checksum = int.from_bytes(index[-CHECKSUM_BYTES:], "little")
        if len(index) < index_bytes or google_crc32c.value(index[:-CHECKSUM_BYTES]) != checksum:
            raise self._lost(name, "is cut off, or its index is damaged")
        chunks = []
        for place in np.frombuffer(index[:-CHECKSUM_BYTES], _PLACE)[:number]:
            start, size = int(place["offset"]), int(place["size"])
            chunk = data[start : start + size]
            trouble = layout.trouble(chunk, int.from_bytes(chunk[-CHECKSUM_BYTES:], "little"))
            if trouble is not None:
                raise self._lost(name, f"has a chunk that is {trouble}")
            chunks.append(chunk)
        ordered = b"".join(chunks) + layout.index(number)
        if ordered != data:
            self.folder.write(name, ordered)
        return chunks

    def _check_rows(self, shard: int, keep_NL: np.ndarray, entry: Mapping[str, Any]) -> None:
        train_N = np.asarray(self.shards[shard]) < self.info.train_windows
        size = self.info.tiling.chunk_windows
        rows_N = (keep_NL & train_N[:, None]).sum(axis=1)
        if [int(rows_N[a : a + size].sum()) for a in range(0, len(rows_N), size)] != entry["rows_per_chunk"]:
            raise self._lost(f"{KEEP}, shard {shard},", "is not what was written there")

    def _outliers(self, tokens_NL: np.ndarray, keep_NL: np.ndarray) -> int:
        """Tokens that only their norm keeps out; so counts padding, too, where that is no special token."""
        policy = self.info.row_policy
        if policy.norm_limits is None:
            return 0
        rows_NL = replace(policy, norm_limits=None).keep(tokens_NL, np.zeros(tokens_NL.shape, bool), {})
        return int((rows_NL & ~keep_NL).sum())

    def _lost(self, name: str, trouble: str) -> SaexError:
        return SaexError(
            f"{self.folder.uri}/{name} {trouble}; a store of version {OLD_VERSION} cannot be repaired: "
            f"'saex-pipe {self.manifest.stage} --force' makes it again"
        )


def _statistics(old: Mapping[str, Any]) -> dict[str, Any]:
    """The statistics of one tap, whose sums were written in digits."""
    return dict(old) | {name: floats_to_text(np.asarray(old[name], np.float64)) for name in ("sum", "sum_square")}
