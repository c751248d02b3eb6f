"""What an activation store is made of: the fixed part of its manifest, and the arrays that follow from it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from saex_pipe.common.formats.int8 import Channels
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.shard import ArrayLayout
from saex_pipe.common.formats.zarr_array import Tiling

DTYPES = {
    "float32": np.dtype("float32"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("float16"),
    "int8": np.dtype("int8"),
}
TOKENS, KEEP = "tokens", "keep"
STORE = "store.json"  # the StoreInfo, written before the first shard


def acts_array(tap: str) -> str:
    """Name of the array with the activations at ``tap``."""
    return f"acts/{tap}"


def scales_array(tap: str) -> str:
    """Name of the array with the scale of every row of an int8 tap."""
    return f"scales/{tap}"


def given_dtypes(dtypes: Mapping[str, str]) -> dict[str, np.dtype]:
    """What a harvest hands to the writer, by tap: int8 is made of bfloat16, which is far more exact."""
    return {tap: DTYPES["bfloat16" if dtype == "int8" else dtype] for tap, dtype in dtypes.items()}


@dataclass(frozen=True)
class StoreInfo:
    """The fixed part of the ``contents`` of a store's manifest."""

    windows: int
    train_windows: int
    window_length: int  # tokens
    taps: Mapping[str, int]  # name -> width
    dtypes: Mapping[str, str]  # name -> key of DTYPES
    tiling: Tiling
    row_policy: RowPolicy
    source: Mapping[str, Any]  # where the activations come from: model and tokenizer, or the toy's truth
    channels: Mapping[str, Channels] = field(default_factory=dict)  # of the int8 taps

    def decoded_dtype(self, tap: str) -> np.dtype:
        """What rows of ``tap`` are read as."""
        return DTYPES["float32" if self.dtypes[tap] == "int8" else self.dtypes[tap]]

    def row_bytes(self, tap: str) -> int:
        """Stored bytes of one row of ``tap``, its scale included."""
        scale = 4 if self.dtypes[tap] == "int8" else 0
        return self.taps[tap] * DTYPES[self.dtypes[tap]].itemsize + scale

    @property
    def activation_bytes(self) -> int:
        """Of all activations, without checksums."""
        return self.windows * self.window_length * sum(map(self.row_bytes, self.taps))

    @property
    def shard_bytes(self) -> int:
        """Of the activations of one whole shard, all taps together, without checksums."""
        return self.tiling.shard_windows * self.window_length * sum(map(self.row_bytes, self.taps))

    def layouts(self) -> dict[str, ArrayLayout]:
        """Every array of the store, by name."""
        shape = (self.windows, self.window_length)
        found = [
            ArrayLayout(TOKENS, shape, np.dtype("int32"), self.tiling),
            ArrayLayout(KEEP, shape, np.dtype("bool"), self.tiling),
        ]
        for tap, width in self.taps.items():
            found.append(ArrayLayout(acts_array(tap), (*shape, width), DTYPES[self.dtypes[tap]], self.tiling))
            if self.dtypes[tap] == "int8":
                found.append(ArrayLayout(scales_array(tap), shape, np.dtype("float32"), self.tiling))
        return {layout.name: layout for layout in found}

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        own = {name: getattr(self, name) for name in ("windows", "train_windows", "window_length", "source")}
        return own | {
            "taps": dict(self.taps),
            "dtypes": dict(self.dtypes),
            "tiling": asdict(self.tiling),
            "row_policy": self.row_policy.to_json(),
            "channels": {tap: channels.to_json() for tap, channels in self.channels.items()},
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "StoreInfo":
        """Inverse of ``to_json``; other keys are ignored."""
        known = {name: value[name] for name in StoreInfo.__dataclass_fields__}
        known |= {"tiling": Tiling(**value["tiling"]), "row_policy": RowPolicy.from_json(value["row_policy"])}
        known["channels"] = {tap: Channels.from_json(channels) for tap, channels in value["channels"].items()}
        return StoreInfo(**known)
