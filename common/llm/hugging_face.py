"""Weights of a Hugging Face folder: one safetensors file, or shards named by an index.

The files are parsed here rather than by ``safetensors.safe_open``, which maps the file and copies from the map, so that
a tensor takes twice its size, and which knows no float8 in NumPy.
The format: https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.slabs import read_slabs

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_AGAIN = "download it again"


class _Tensor(NamedTuple):
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the file's start


class SafetensorsFolder:
    """The tensors of a folder by name; each is read when asked for.

    Raises an ``InputError`` where a file is missing, not safetensors, or truncated, or the index names a tensor
    that its shard does not hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / _SINGLE).is_file():
            self._tensors = _read_header(path / _SINGLE)
        elif (path / _INDEX).is_file():
            self._tensors = self._read_shards()
        else:
            raise InputError(
                f"{path} holds neither {_SINGLE} nor {_INDEX}",
                "use a model, or a revision of it, with safetensors weights (pytorch_model.bin is not read)",
            )
        self.shapes: dict[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, dtype: Any = np.float32) -> np.ndarray:
        """One tensor in ``dtype``, [out, in] for a matrix; the caller has checked that ``shapes`` holds ``name``.

        Takes little more memory than the result. Raises an ``InputError`` as ``check`` does.
        """
        self.check([name])
        tensor = self._tensors[name]
        stored = _DTYPES[tensor.dtype]
        row_bytes = (tensor.shape[-1] if tensor.shape else 1) * stored.itemsize
        return read_slabs(
            tensor.path, tensor.offset, tensor.shape, row_bytes, lambda rows: rows.view(stored), np.dtype(dtype)
        )

    def check(self, names: Iterable[str]) -> None:
        """Raise an ``InputError`` that names the first tensor that is stored in an unknown dtype."""
        for name in names:
            stored = self._tensors[name].dtype
            if stored not in _DTYPES:
                raise InputError(
                    f"{self.path}: tensor {name} is stored as {stored}, which this version does not read",
                    f"use weights stored as {', '.join(_DTYPES)}",
                )

    def _read_shards(self) -> dict[str, _Tensor]:
        index = self.path / _INDEX
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise InputError(f"{index} has no weight_map from tensors to files", _AGAIN)
        shards = {name: _read_header(self.path / name) for name in sorted(set(places.values()))}
        for tensor, name in places.items():
            if tensor not in shards[name]:
                raise InputError(f"{self.path / name} lacks tensor {tensor}, which {_INDEX} places there", _AGAIN)
        return {tensor: place for shard in shards.values() for tensor, place in shard.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or an ``InputError`` that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}", "check that the model folder is complete"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", "get an intact copy of it") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object", "get an intact copy of it")
    return value


def _read_header(path: Path) -> dict[str, _Tensor]:
    """The tensors of one file: eight bytes say how long the header is, which is JSON; the data follow it."""
    try:
        with open(path, "rb") as file:
            file_bytes = path.stat().st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(start - 8 if start <= file_bytes else 0))
        found = {name: _tensor(path, start, entry) for name, entry in header.items() if name != "__metadata__"}
        end = max((start + entry["data_offsets"][1] for name, entry in header.items() if name in found), default=start)
    except FileNotFoundError:
        raise InputError(f"shard {path} is missing", "download the model again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "check the path and its permissions") from None
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is truncated or not a safetensors file", _AGAIN) from None
    if end != file_bytes:
        raise InputError(
            f"{path} is truncated or not a safetensors file: {file_bytes} bytes, {end} by its header", _AGAIN
        )
    return found


def _tensor(path: Path, start: int, entry: dict[str, Any]) -> _Tensor:
    """A tensor by its entry in the header; a ``ValueError`` where that contradicts itself."""
    dtype, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end - begin)):
        raise ValueError
    if dtype in _DTYPES and end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError
    return _Tensor(path, dtype, shape, start + begin)
