"""The activation store: the geometry of the token store, with one array a tap.

``tokens``        int32   [N, L]       copied, so that a store stands alone
``keep``          bool    [N, L]       which tokens are rows (see ``row_policy``)
``acts/<tap>``    dtype   [N, L, D]    float32, bfloat16, float16 or int8
``scales/<tap>``  float32 [N, L]       of int8 taps: the scale of each row (see ``int8``)

Row and token address each other without an index. Only kept tokens of windows [0, train_windows) are
training rows and enter the statistics; later windows are held out.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int32

from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.chunk_index import ChunkIndex, checksum_text, write_chunk_index
from saex_pipe.common.formats.chunk_reads import ChunkReads
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.shard import EncodedShard
from saex_pipe.common.formats.statistics import ActivationStatistics
from saex_pipe.common.formats.store_info import DTYPES, KEEP, STORE, TOKENS, StoreInfo, acts_array, scales_array
from saex_pipe.common.formats.zarr_array import create_array, create_groups
from saex_pipe.common.shuffle import RowOrder

WRITERS = ("harvest", "toy", "copy")
CALIBRATION = "calibration.json"  # what the first windows decided for the whole store
SCHEMA_VERSION = 2  # 1 had one dtype, no checksum of each chunk, and its index inside the manifest

__all__ = [
    "CALIBRATION",
    "DTYPES",
    "SCHEMA_VERSION",
    "WRITERS",
    "ActivationStore",
    "ActivationWriter",
    "Overtaken",
    "StoreInfo",
]


class Overtaken(Exception):  # noqa: N818 - an outcome that the caller acts on, not a mistake
    """Another writer has written an object of this shard since its versions were taken."""


class ActivationWriter:
    """Writes whole shards of a store; ``write_shard`` may be called in any order, by any number of processes."""

    def __init__(self, folder: Folder, info: StoreInfo) -> None:
        self.info = info
        self._folder = folder
        self._layouts = info.layouts()
        if folder.read(STORE) is None:  # else by another writer, or by this one before it was stopped
            folder.write(STORE, json.dumps(info.to_json(), sort_keys=True).encode())
        groups = sorted({name.rpartition("/")[0] for name in self._layouts})
        create_groups(folder, tuple(groups))
        for layout in self._layouts.values():
            create_array(
                folder,
                layout.name,
                shape=layout.shape,
                dtype=layout.dtype.name,
                tiling=layout.tiling,
                axes="NLD"[: len(layout.shape)],
            )

    def versions(self, windows: range) -> dict[str, bytes]:
        """The version of every object of a shard as it is now, for ``write_shard(over=...)``."""
        names = [layout.shard_object(self._shard(windows)) for layout in self._layouts.values()]
        return {name: self._folder.version(name) for name in names}

    def write_shard(
        self,
        windows: range,
        tokens_NL: Int32[np.ndarray, "N L"],
        keep_NL: Bool[np.ndarray, "N L"],
        acts: Mapping[str, Float[np.ndarray, "N L D"]],
        *,
        outliers: Mapping[str, Bool[np.ndarray, "N L"]] = MappingProxyType({}),
        over: Mapping[str, bytes] | None = None,
    ) -> dict[str, Any]:
        """Write one shard, durably, and return its ledger entry. Kept rows that are not finite are refused.

        Args:
            windows: of the shard, as the tiling cuts them.
            tokens_NL: token ids.
            keep_NL: which tokens are rows.
            acts: activations by tap, of the tap's dtype; for an int8 tap, of any floating type.
            outliers: by tap, the tokens that are no rows only because of their norm there.
            over: the versions of the objects that this shard may replace; None replaces whatever is there.

        Raises:
            Overtaken: another writer replaced an object first.
        """
        train_NL = keep_NL & (np.asarray(windows) < self.info.train_windows)[:, None]
        chunk = self.info.tiling.chunk_windows
        entry: dict[str, Any] = {
            "windows": [windows.start, windows.stop],
            "rows": int(train_NL.sum()),
            "rows_per_chunk": [int(train_NL[a : a + chunk].sum()) for a in range(0, len(windows), chunk)],
            "outliers": int(np.any([*outliers.values()], axis=0).sum()),
            "tap_outliers": {tap: int(found_NL.sum()) for tap, found_NL in outliers.items()},
            "checksums": {},
            "statistics": {},
            "added_error": {},
        }
        with _Writes(self._folder, over) as writes:
            for tap, acts_NLD in acts.items():
                for name, values in self._encoded(tap, acts_NLD).items():
                    entry["checksums"][name] = self._start(writes, name, windows, values)
                entry["statistics"][tap] = self._statistics(tap, windows, acts_NLD, train_NL).to_json()
                if self.info.dtypes[tap] == "int8":
                    entry["added_error"][tap] = self._added_error(tap, acts_NLD, train_NL)
            for name, values in ((TOKENS, tokens_NL), (KEEP, keep_NL)):
                entry["checksums"][name] = self._start(writes, name, windows, values)
        return entry

    def _start(self, writes: "_Writes", name: str, windows: range, values: np.ndarray) -> str:
        """Begin to write one object, and return the checksums of its chunks."""
        layout = self._layouts[name]
        assert values.dtype == layout.dtype, f"{name} is {layout.dtype}, not {values.dtype}"
        encoded = layout.encode(values)
        writes.start(layout.shard_object(self._shard(windows)), encoded)
        return checksum_text(encoded.checksums)

    def _encoded(self, tap: str, acts_NLD: np.ndarray) -> dict[str, np.ndarray]:
        if self.info.dtypes[tap] != "int8":
            return {acts_array(tap): acts_NLD}
        values_NLD, scales_NL = np.empty(acts_NLD.shape, np.int8), np.empty(acts_NLD.shape[:2], np.float32)
        for window, acts_LD in enumerate(acts_NLD):  # one at a time: each takes several times its size for a moment
            values_NLD[window], scales_NL[window] = self.info.channels[tap].encode(acts_LD)
        return {acts_array(tap): values_NLD, scales_array(tap): scales_NL}

    def _statistics(self, tap: str, windows: range, acts_NLD: np.ndarray, train_NL: np.ndarray) -> ActivationStatistics:
        with np.errstate(invalid="ignore", over="ignore"):
            found = ActivationStatistics.of_rows(acts_NLD, train_NL)
        if not np.isfinite(found.sum_square_D).all():
            raise _not_finite(tap, windows, self.info.dtypes[tap], bool(np.isnan(acts_NLD[train_NL]).any()))
        return found

    def _added_error(self, tap: str, acts_NLD: np.ndarray, train_NL: np.ndarray) -> float:
        """Sum over the training rows of the squared distance between what is stored and what was given."""
        channels, total = self.info.channels[tap], 0.0
        for rows_LD, train_L in zip(acts_NLD, train_NL, strict=True):
            exact_BD = rows_LD[train_L].astype(np.float32)
            total += float(np.square(channels.decode(*channels.encode(exact_BD)) - exact_BD).sum(dtype=np.float64))
        return total

    def _shard(self, windows: range) -> int:
        return windows.start // self.info.tiling.shard_windows


class _Writes:
    """Objects being written while the next ones are put together; all are durable at the end of the block."""

    def __init__(self, folder: Folder, over: Mapping[str, bytes] | None) -> None:
        self._folder, self._over = folder, over
        self._finish: list[Callable[[], None]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")

    def start(self, name: str, shard: EncodedShard) -> None:
        over = None if self._over is None else self._over[name]
        self._finish.append(self._thread.submit(self._write, name, shard, over).result)

    def _write(self, name: str, shard: EncodedShard, over: bytes | None) -> None:
        if not self._folder.write_pieces(name, shard.pieces, over):
            raise Overtaken(name)

    def __enter__(self) -> "_Writes":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed: BaseException | None = None
        try:
            for finish in self._finish:  # all of them: none must go on behind the back of whoever hears of a failure
                try:
                    finish()
                except (SaexError, InputError, Overtaken) as error:
                    failed = failed or error
        finally:
            self._thread.shutdown()
        if failed is not None and kind is None:
            raise failed


def _not_finite(tap: str, windows: range, dtype: str, has_nan: bool) -> SaexError:
    """A conversion that overflows gives infinity, and only float16 is narrow enough for that."""
    where = f"{tap} in windows {windows.start} to {windows.stop - 1}"
    if dtype == "float16" and not has_nan:
        return SaexError(f"{where} has values that float16 cannot hold; set store_dtype to bfloat16 or float32")
    return SaexError(f"{where}: the model's activations at this tap are not finite; try compute_dtype=float32")


def finish_contents(folder: Folder, info: StoreInfo, ledger: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Write the index of a store whose every shard is in ``ledger``, and return its manifest's ``contents``."""
    entries = [ledger[shard] for shard in sorted(ledger)]
    statistics = {
        tap: ActivationStatistics.merge([ActivationStatistics.from_json(e["statistics"][tap]) for e in entries])
        for tap in info.taps
    }
    rows = sum(entry["rows"] for entry in entries)
    outliers = sum(entry["outliers"] for entry in entries)
    candidates = max(rows + outliers, 1)
    return info.to_json() | {
        "rows": rows,
        "outlier_share": outliers / candidates,  # of the tokens that would be rows, beyond the limit of any tap
        "tap_outlier_share": {
            tap: sum(entry["tap_outliers"][tap] for entry in entries) / candidates
            for tap in info.taps
            if all(tap in entry.get("tap_outliers", {}) for entry in entries)  # not of shards of earlier versions
        },
        "statistics": {tap: found.to_json() for tap, found in statistics.items()},
        "added_error": {
            tap: sum(entry["added_error"][tap] for entry in entries)
            / max(float(statistics[tap].variance_D.sum()) * statistics[tap].count, np.finfo(np.float64).tiny)
            for tap in info.channels
        },
        "index": write_chunk_index(folder, entries),
    }


class ActivationStore(ChunkReads):
    """A finished activation store, opened for reading. Every chunk that is read is checked against the ledger."""

    def __init__(self, uri: str, taps: Sequence[str] = ()) -> None:
        self.uri = uri
        self.manifest = Manifest.require(uri, WRITERS, SCHEMA_VERSION)
        self.digest = self.manifest.digest
        if self.manifest.contents.get("freed_below"):
            raise InputError(
                f"{uri}: followers have freed its first {self.manifest.contents['freed_below']} shards",
                "harvest again without max_store_bytes",
            )
        self.info = StoreInfo.from_json(self.manifest.contents)
        self.rows = int(self.manifest.contents["rows"])
        folder = Folder(uri)
        self.index = ChunkIndex(folder, self.manifest.contents["index"])
        super().__init__(folder, self.info, lambda array, chunk: int(self.index.checksums(array)[chunk]))
        for tap in taps:
            self.require_tap(tap)

    def require_tap(self, tap: str) -> int:
        """The width of ``tap``; an InputError names the taps the store has."""
        if tap not in self.info.taps:
            raise InputError(f"{self.uri} has no tap {tap!r}", f"it holds {', '.join(self.info.taps)}")
        return self.info.taps[tap]

    def statistics(self, tap: str) -> ActivationStatistics:
        """Statistics of the training rows of ``tap``."""
        return ActivationStatistics.from_json(self.manifest.contents["statistics"][tap])

    def rows_per_chunk(self) -> np.ndarray:
        """int32 [chunks]: training rows of each chunk of windows."""
        return self.index.rows_per_chunk()

    def row_order(self, seed: int, pool_rows: int, lanes: int) -> RowOrder:
        """The order of training rows."""
        return RowOrder(self.rows_per_chunk(), seed, pool_rows, lanes)
