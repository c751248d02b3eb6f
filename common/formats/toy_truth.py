"""What generated a toy store: ``truth/dictionary`` float32 [F, D] and ``truth/codes`` float32 [N, L, F]."""

from typing import Any

import numpy as np
from jaxtyping import Float32

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.zarr_array import (
    Tiling,
    create_array,
    create_groups,
    open_array,
    read_windows,
    write_windows,
)

_DICTIONARY, _CODES = "truth/dictionary", "truth/codes"


def write_dictionary(folder: Folder, dictionary_FD: Float32[np.ndarray, "F D"]) -> None:
    """Write the true dictionary, one feature a row."""
    create_groups(folder, ("truth",))
    latents = len(dictionary_FD)
    array = create_array(
        folder, _DICTIONARY, shape=dictionary_FD.shape, dtype="float32", tiling=Tiling(latents, latents), axes="FD"
    )
    write_windows(array, range(latents), dictionary_FD)


def create_codes(folder: Folder, *, windows: int, window_length: int, latents: int, tiling: Tiling) -> Any:
    """Create (or open) the array of true codes, to be written a shard at a time with ``write_windows``."""
    shape = (windows, window_length, latents)
    return create_array(folder, _CODES, shape=shape, dtype="float32", tiling=tiling, axes="NLF")


def read_dictionary(uri: str) -> Float32[np.ndarray, "F D"]:
    """The true dictionary of the toy store at ``uri``."""
    folder = Folder(uri)
    if not folder.list(_DICTIONARY):
        raise InputError(f"{uri} has no true dictionary", "only the output of 'saex-pipe toy' has one")
    array = open_array(folder, _DICTIONARY)
    return read_windows(array, range(array.shape[0]))
