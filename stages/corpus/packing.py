"""The layout of documents in windows, as arithmetic on token counts.

A window has ``slots`` for text: its length, less one when it starts with BOS. The slots of all windows form one
line; ``packed`` lays the documents end to end on it, ``padded`` starts each at the next window. Training
documents fill the line first; held-out ones start at the first held-out window, so no document is on both sides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64


@dataclass(frozen=True)
class Layout:
    """Which document stands where on the line of slots."""

    documents: Int64[np.ndarray, " documents"]  # numbers of the documents in the sources, in the order they are laid
    starts: Int64[np.ndarray, " documents"]  # first slot of each
    stops: Int64[np.ndarray, " documents"]  # one past its last; a document may be cut short
    slots: int  # a window
    windows: int
    train_windows: int


class Marks(NamedTuple):
    """Token ids that are not text; None where a window has none."""

    bos: int | None
    pad: int


def lay_out(
    documents: Int64[np.ndarray, " documents"],
    token_counts: Int64[np.ndarray, " documents"],
    *,
    slots: int,
    packed: bool,
    max_windows: int | None,
    holdout_fraction: float,
) -> Layout:
    """Lay ``documents`` of ``token_counts`` tokens out in at most ``max_windows`` windows.

    Held out are the last ``holdout_fraction`` of the windows, rounded, but at least one where there are two.
    """
    sizes = token_counts if packed else -(-token_counts // slots) * slots
    available = int(sizes.sum()) // slots
    windows = available if max_windows is None else min(available, max_windows)
    held_out = (
        min(max(round(windows * holdout_fraction), 1), windows - 1) if holdout_fraction > 0 and windows > 1 else 0
    )
    train_windows = windows - held_out
    boundary = train_windows * slots
    ends = np.cumsum(sizes)
    train_documents = int(np.searchsorted(ends, boundary)) + 1 if held_out else len(ends)
    starts = ends - sizes
    starts[train_documents:] += boundary - (ends[train_documents - 1] if train_documents else 0)
    limit = np.where(np.arange(len(ends)) < train_documents, boundary if held_out else windows * slots, windows * slots)
    stops = np.minimum(starts + token_counts, limit)
    filled = int(stops.max(initial=0))
    windows = min(windows, filled // slots if packed else -(-filled // slots))
    inside = starts < np.minimum(limit, windows * slots)
    return Layout(documents[inside], starts[inside], stops[inside], slots, windows, min(train_windows, windows))


def fill_windows(
    layout: Layout, tokens_of: Callable[[int], Int32[np.ndarray, " tokens"]], windows: range, length: int, marks: Marks
) -> tuple[Int32[np.ndarray, "N L"], Int32[np.ndarray, "N L"]]:
    """Token ids and document numbers (-1: padding) of ``windows``.

    ``tokens_of(place)`` gives the tokens of the document at that place of the layout.
    """
    first, last = windows.start * layout.slots, windows.stop * layout.slots
    tokens, documents = np.full(last - first, marks.pad, np.int32), np.full(last - first, -1, np.int32)
    for place in np.flatnonzero((layout.starts < last) & (layout.stops > first)):
        start, stop = int(layout.starts[place]), int(layout.stops[place])
        here = slice(max(start, first) - first, min(stop, last) - first)
        tokens[here] = tokens_of(int(place))[max(start, first) - start : min(stop, last) - start]
        documents[here] = layout.documents[place]
    tokens_NL = tokens.reshape(len(windows), layout.slots)
    documents_NL = documents.reshape(len(windows), layout.slots)
    if layout.slots < length:
        assert marks.bos is not None
        tokens_NL = np.pad(tokens_NL, ((0, 0), (1, 0)), constant_values=marks.bos)
        documents_NL = np.concatenate([documents_NL[:, :1], documents_NL], axis=1)
    return tokens_NL, documents_NL
