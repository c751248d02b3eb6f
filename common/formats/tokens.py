"""The token store: fixed-length windows of token ids, and the document each token comes from.

``tokens``     int32 [N, L]  token ids
``documents``  int32 [N, L]  index of the source document, -1 for padding

Windows [0, train_windows) are for training; the rest are held out. No document stands on both sides.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.zarr_array import (
    Tiling,
    create_array,
    create_groups,
    open_array,
    read_windows,
    write_windows,
)


class StoreShape(NamedTuple):
    """The geometry of a token store."""

    windows: int
    window_length: int  # tokens
    shard_windows: int

    @property
    def tiling(self) -> Tiling:
        """A shard is one chunk: token stores are small and read in order."""
        return Tiling(self.shard_windows, self.shard_windows)


@dataclass(frozen=True)
class TokenStoreInfo:
    """The ``contents`` of a token store's manifest."""

    windows: int
    train_windows: int
    window_length: int  # tokens
    packing: str
    shard_windows: int
    tokenizer: dict[str, Any]  # uri, digest, vocabulary, bos, eos, pad, special_ids, chat_template (its digest)
    documents: int  # of the sources

    @property
    def shape(self) -> StoreShape:
        """The geometry."""
        return StoreShape(self.windows, self.window_length, self.shard_windows)

    def as_contents(self) -> dict[str, Any]:
        """As JSON values for the manifest."""
        return asdict(self)


def create_token_arrays(folder: Folder, shape: StoreShape) -> tuple[Any, Any]:
    """Create (or open) ``tokens`` and ``documents``."""
    create_groups(folder, ("",))
    axes = (shape.windows, shape.window_length)
    tokens = create_array(folder, "tokens", shape=axes, dtype="int32", tiling=shape.tiling, axes="NL")
    return tokens, create_array(folder, "documents", shape=axes, dtype="int32", tiling=shape.tiling, axes="NL")


def write_token_shard(
    arrays: tuple[Any, Any], windows: range, tokens_NL: Int32[np.ndarray, "N L"], documents_NL: Int32[np.ndarray, "N L"]
) -> None:
    """Write one whole shard of both arrays."""
    write_windows(arrays[0], windows, tokens_NL)
    write_windows(arrays[1], windows, documents_NL)


class TokenStore:
    """A finished token store, opened for reading."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.manifest = Manifest.require(uri, ("corpus",))
        self.info = TokenStoreInfo(**self.manifest.contents)
        folder = Folder(uri)
        self._tokens = open_array(folder, "tokens")
        self._documents = open_array(folder, "documents")

    def tokens(self, windows: range) -> Int32[np.ndarray, "N L"]:
        """Token ids of ``windows``."""
        return read_windows(self._tokens, windows)

    def documents(self, windows: range) -> Int32[np.ndarray, "N L"]:
        """Document indices of ``windows``, -1 for padding."""
        return read_windows(self._documents, windows)
