"""The intermediate files of the corpus stage: document lengths, tokenised batches, the layout.

They live in ``parts/`` of the stage's folder, each written whole, so that a killed run continues with the first
missing one; they are deleted before the manifest is written.
"""

from dataclasses import asdict
from functools import lru_cache

import numpy as np
from jaxtyping import Int32, Int64

from saex_pipe.common.formats.folder import Folder
from saex_pipe.stages.corpus.packing import Layout

_BATCH_CHARACTERS = 1 << 20  # of one element of the pipeline

PARTS = "parts/"
ORDER = "parts/order.npz"
_LAYOUT = "parts/layout.npz"


def lengths_name(source: int) -> str:
    """Object that holds the document lengths of source number ``source``."""
    return f"parts/lengths-{source:06d}.npz"


def batch_name(batch: int) -> str:
    """Object that holds tokenised batch ``batch``."""
    return f"parts/tokens-{batch:06d}.npz"


def cut_batches(lengths: Int64[np.ndarray, " documents"]) -> Int64[np.ndarray, " batches_1"]:
    """Places at which batches of about a million characters begin and end, for documents in their order."""
    batch_of = np.cumsum(lengths) // _BATCH_CHARACTERS
    return np.concatenate([[0], np.flatnonzero(np.diff(batch_of)) + 1, [len(lengths)]]).astype(np.int64)


class TokenisedParts:
    """Reads tokenised documents by their place in the order, keeping a few batches in memory."""

    def __init__(self, folder: Folder, cuts: Int64[np.ndarray, " batches_1"]) -> None:
        self._folder, self._cuts = folder, cuts
        self._batch = lru_cache(maxsize=4)(self._read)

    def _read(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        arrays = self._folder.read_arrays(batch_name(batch))
        assert arrays is not None, "a batch is read after it was written"
        return arrays["tokens"], np.concatenate([[0], np.cumsum(arrays["counts"])])

    def tokens_of(self, place: int) -> Int32[np.ndarray, " tokens"]:
        """Tokens of the document at ``place``."""
        batch = int(np.searchsorted(self._cuts, place, side="right")) - 1
        tokens, ends = self._batch(batch)
        within = place - int(self._cuts[batch])
        return tokens[ends[within] : ends[within + 1]]


def write_layout(folder: Folder, layout: Layout) -> None:
    """Keep the layout for the processes that write shards."""
    folder.write_arrays(_LAYOUT, {name: np.asarray(value) for name, value in asdict(layout).items()})


def read_layout(folder: Folder) -> Layout | None:
    """The layout, None before it is known."""
    arrays = folder.read_arrays(_LAYOUT)
    if arrays is None:
        return None
    slots, windows, train_windows = (int(arrays[name]) for name in ("slots", "windows", "train_windows"))
    return Layout(arrays["documents"], arrays["starts"], arrays["stops"], slots, windows, train_windows)
