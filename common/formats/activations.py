"""The activation store: the geometry of the token store, with one array a tap.

``tokens``      int32 [N, L]       copied, so that a store stands alone
``keep``        bool  [N, L]       which tokens are rows (see ``row_policy``)
``acts/<tap>``  dtype [N, L, D]    float32, bfloat16 or float16

Row and token address each other without an index. Only kept tokens of windows [0, train_windows) are
training rows and enter the statistics; later windows are held out.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float, Int32

from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.statistics import ActivationStatistics
from saex_pipe.common.formats.zarr_array import (
    Tiling,
    create_array,
    create_groups,
    open_array,
    read_windows,
    write_windows,
)

DTYPES = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("float16")}
WRITERS = ("harvest", "toy")


@dataclass(frozen=True)
class StoreInfo:
    """What a store is made of; the fixed part of its manifest's ``contents``."""

    windows: int
    train_windows: int
    window_length: int  # tokens
    taps: Mapping[str, int]  # name -> width
    dtype: str
    tiling: Tiling
    row_policy: RowPolicy
    source: Mapping[str, Any]  # where the activations come from: model and tokenizer, or the toy's truth

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"row_policy": self.row_policy.to_json()}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "StoreInfo":
        """Inverse of ``to_json``; other keys are ignored."""
        known = {name: value[name] for name in StoreInfo.__dataclass_fields__}
        known |= {"tiling": Tiling(**value["tiling"]), "row_policy": RowPolicy.from_json(value["row_policy"])}
        return StoreInfo(**known)


class ActivationWriter:
    """Writes whole shards of a store; ``write_shard`` may be called in any order, by any number of processes."""

    def __init__(self, folder: Folder, info: StoreInfo) -> None:
        self.info = info
        create_groups(folder, ("", "acts"))
        shape = (info.windows, info.window_length)
        self._tokens = create_array(folder, "tokens", shape=shape, dtype="int32", tiling=info.tiling, axes="NL")
        self._keep = create_array(folder, "keep", shape=shape, dtype="bool", tiling=info.tiling, axes="NL")
        self._acts = {
            tap: create_array(
                folder, f"acts/{tap}", shape=(*shape, width), dtype=info.dtype, tiling=info.tiling, axes="NLD"
            )
            for tap, width in info.taps.items()
        }

    def write_shard(
        self,
        windows: range,
        tokens_NL: Int32[np.ndarray, "N L"],
        keep_NL: Bool[np.ndarray, "N L"],
        acts: Mapping[str, Float[np.ndarray, "N L D"]],
    ) -> dict[str, Any]:
        """Write one shard, durably, and return its ledger entry. Non-finite kept rows are refused."""
        train_NL = keep_NL & (np.asarray(windows) < self.info.train_windows)[:, None]
        chunk = self.info.tiling.chunk_windows
        entry: dict[str, Any] = {
            "windows": [windows.start, windows.stop],
            "rows": int(train_NL.sum()),
            "rows_per_chunk": [int(train_NL[a : a + chunk].sum()) for a in range(0, len(windows), chunk)],
            "crc32": {},
            "statistics": {},
        }
        for tap, acts_NLD in acts.items():
            rows_BD = acts_NLD[train_NL].astype(np.float32)
            if not np.isfinite(rows_BD).all():
                raise _not_finite(tap, windows, self.info.dtype, bool(np.isnan(rows_BD).any()))
            entry["statistics"][tap] = ActivationStatistics.of_rows(rows_BD).to_json()
            entry["crc32"][tap] = zlib.crc32(np.ascontiguousarray(acts_NLD).view(np.uint8).data)
            write_windows(self._acts[tap], windows, acts_NLD)
        write_windows(self._tokens, windows, tokens_NL)
        write_windows(self._keep, windows, keep_NL)
        return entry


def _not_finite(tap: str, windows: range, dtype: str, has_nan: bool) -> SaexError:
    """A conversion that overflows gives infinity, and only float16 is narrow enough for that."""
    where = f"{tap} in windows {windows.start} to {windows.stop - 1}"
    if dtype == "float16" and not has_nan:
        return SaexError(f"{where} has values that float16 cannot hold; set store_dtype to bfloat16 or float32")
    return SaexError(f"{where}: the model's activations at this tap are not finite; try compute_dtype=float32")


def merged_contents(info: StoreInfo, ledger: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest's ``contents`` of a store whose every shard is in ``ledger``."""
    entries = [ledger[shard] for shard in sorted(ledger)]
    statistics = {
        tap: ActivationStatistics.merge(
            [ActivationStatistics.from_json(e["statistics"][tap]) for e in entries]
        ).to_json()
        for tap in info.taps
    }
    return info.to_json() | {
        "rows": sum(entry["rows"] for entry in entries),
        "rows_per_chunk": [rows for entry in entries for rows in entry["rows_per_chunk"]],
        "statistics": statistics,
    }


class ActivationStore:
    """A finished activation store, opened for reading."""

    def __init__(self, uri: str, taps: Sequence[str] = ()) -> None:
        self.uri = uri
        self.manifest = Manifest.require(uri, WRITERS)
        self.info = StoreInfo.from_json(self.manifest.contents)
        self.rows = int(self.manifest.contents["rows"])
        for tap in taps:
            self.require_tap(tap)
        folder = Folder(uri)
        self._tokens = open_array(folder, "tokens")
        self._keep = open_array(folder, "keep")
        self._acts = {tap: open_array(folder, f"acts/{tap}") for tap in taps}

    def require_tap(self, tap: str) -> int:
        """The width of ``tap``; an InputError names the taps the store has."""
        if tap not in self.info.taps:
            raise InputError(f"{self.uri} has no tap {tap!r}", f"it holds {', '.join(self.info.taps)}")
        return self.info.taps[tap]

    def statistics(self, tap: str) -> ActivationStatistics:
        """Statistics of the training rows of ``tap``."""
        return ActivationStatistics.from_json(self.manifest.contents["statistics"][tap])

    def rows_per_chunk(self) -> np.ndarray:
        """int64 [chunks]: training rows of each chunk of windows."""
        return np.asarray(self.manifest.contents["rows_per_chunk"], np.int64)

    def chunk_windows(self, chunk: int) -> range:
        """The windows of ``chunk``."""
        size = self.info.tiling.chunk_windows
        return range(chunk * size, min((chunk + 1) * size, self.info.windows))

    def tokens(self, windows: range) -> Int32[np.ndarray, "N L"]:
        """Token ids."""
        return read_windows(self._tokens, windows)

    def keep(self, windows: range) -> Bool[np.ndarray, "N L"]:
        """Which tokens are rows, held-out windows included."""
        return read_windows(self._keep, windows)

    def train_keep(self, windows: range) -> Bool[np.ndarray, "N L"]:
        """Which tokens are training rows."""
        return self.keep(windows) & (np.asarray(windows) < self.info.train_windows)[:, None]

    def acts(self, tap: str, windows: range) -> Float[np.ndarray, "N L D"]:
        """Activations in the store's dtype."""
        return read_windows(self._acts[tap], windows)
