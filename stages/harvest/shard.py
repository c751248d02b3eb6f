"""One shard of the store while it is being filled, batch by batch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from saex_pipe.common.formats.store_info import StoreInfo, given_dtypes
from saex_pipe.stages.harvest.forward import Harvested, pieces


@dataclass(frozen=True)
class Shard:
    """Token ids and padding of the windows of one shard, and room for what the model makes of them, by tap."""

    number: int
    windows: range
    tokens_NL: Int32[np.ndarray, "N L"]
    padding_NL: Bool[np.ndarray, "N L"]
    acts: Mapping[str, Float[np.ndarray, "N L D"]]
    norms: Mapping[str, Float32[np.ndarray, "N L"]]

    @staticmethod
    def empty(info: StoreInfo, number: int, windows: range, tokens_NL: np.ndarray, padding_NL: np.ndarray) -> "Shard":
        """A shard of the store ``info`` before any pass."""
        given = given_dtypes(info.dtypes)
        acts = {tap: np.empty((*tokens_NL.shape, width), given[tap]) for tap, width in info.taps.items()}
        norms = {tap: np.empty(tokens_NL.shape, np.float32) for tap in info.taps}
        return Shard(number, windows, tokens_NL, padding_NL, acts, norms)

    def batches(self, batch_windows: int) -> Iterator["Batch"]:
        """The shard in forward passes; none goes across shards, so that each comes out the same whoever makes it."""
        for start in range(0, len(self.windows), batch_windows):
            yield Batch(self, slice(start, min(start + batch_windows, len(self.windows))))


@dataclass(frozen=True)
class Batch:
    """Windows that go through the model together: ``shard.tokens_NL[rows]``."""

    shard: Shard
    rows: slice

    @property
    def tokens_NL(self) -> Int32[np.ndarray, "N L"]:
        """Their token ids."""
        return self.shard.tokens_NL[self.rows]

    @property
    def bytes(self) -> int:
        """Size of their activations."""
        return sum(acts_NLD[self.rows].nbytes for acts_NLD in self.shard.acts.values())

    @property
    def completes_shard(self) -> bool:
        """Whether these windows are the last of their shard."""
        return self.rows.stop == len(self.shard.windows)

    def fill(self, harvested: Harvested) -> None:
        """Copy the activations from their devices into the shard; rows beyond it were padding."""
        for tap, acts_NLD in self.shard.acts.items():
            copy_rows(harvested.acts[tap], acts_NLD[self.rows])
            copy_rows(harvested.norms[tap], self.shard.norms[tap][self.rows])


def copy_rows(source: jax.Array, target: np.ndarray) -> None:
    """Copy the first rows of an array that is cut over its rows, piece by piece from the devices that hold them."""
    for piece in pieces(source):
        start = piece.index[0].start or 0
        rows = target[start : start + len(piece.data)]
        rows[...] = np.asarray(piece.data)[: len(rows)]
