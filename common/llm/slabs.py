"""Tensors read from a file a slab of rows at a time, so that reading takes little more memory than the result.

Files are read rather than mapped: mapped pages count as the process's memory, and a whole model would pass through.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from saex_pipe.common.errors import InputError

_SLAB_VALUES = 1 << 18  # decoded at a time: 1 MiB of float32, which stays in the processor's cache


def read_slabs(
    path: Path,
    offset: int,
    shape: tuple[int, ...],
    row_bytes: int,
    decode: Callable[[np.ndarray], np.ndarray],
    dtype: np.dtype,
) -> np.ndarray:
    """A tensor of ``shape`` in ``dtype``.

    Args:
        path: the file.
        offset: where the tensor begins in it, in bytes.
        shape: of the tensor; rows run along its last axis.
        row_bytes: what a row takes in the file.
        decode: gives the values [rows, row length] of stored rows, uint8 [rows, row_bytes].
        dtype: what the values are cast to.

    Raises:
        InputError: where the file cannot be read, or has become shorter.
    """
    width = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    out = np.empty((rows, width), dtype)
    slab = max(_SLAB_VALUES // max(width, 1), 1)
    stored = np.empty((min(slab, rows), row_bytes), np.uint8)
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            for start in range(0, rows, slab):
                part = stored[: min(slab, rows - start)]
                _fill(file.readinto, part, path)
                out[start : start + slab] = decode(part)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "check the path and its permissions") from None
    return out.reshape(shape)


def _fill(readinto: Callable[[memoryview], int | None], part: np.ndarray, path: Path) -> None:
    unread = part.reshape(-1).data
    while len(unread):
        count = readinto(unread)
        if not count:
            raise InputError(f"{path} has become shorter while it was read", "get an intact copy of the file")
        unread = unread[count:]
