"""Weights of a Hugging Face folder: one safetensors file, or shards named by an index."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from saex_pipe.common.errors import InputError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("F64", "F32", "F16", "BF16")


class SafetensorsFolder:
    """The tensors of a folder by name; each is read when asked for.

    Raises an ``InputError`` where a file is missing, not safetensors, or truncated, or the index names a tensor
    that its shard does not hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        index = path / _INDEX
        if (path / _SINGLE).is_file():
            expected: dict[str, str] | None = None
            names = [_SINGLE]
        elif index.is_file():
            expected = read_json(index).get("weight_map", {})
            names = sorted(set(expected.values()))
        else:
            raise InputError(
                f"{path} holds neither {_SINGLE} nor {_INDEX}", "point to a folder with safetensors weights"
            )
        self._shards = {name: _open(path / name) for name in names}
        self._places = {tensor: name for name, shard in self._shards.items() for tensor in shard.keys()}  # noqa: SIM118
        for tensor, name in (expected or {}).items():
            if self._places.get(tensor) != name:
                raise InputError(
                    f"{path / name} lacks tensor {tensor}, which {_INDEX} places there", "download it again"
                )
        self.shapes: dict[str, tuple[int, ...]] = {
            tensor: tuple(self._shards[name].get_slice(tensor).get_shape()) for tensor, name in self._places.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, [out, in] for a matrix."""
        shard = self._shards[self._places[name]]
        stored = shard.get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise InputError(
                f"{self.path}: tensor {name} is stored as {stored}, which this version does not read",
                f"use weights stored as {', '.join(_DTYPES)}",
            )
        return shard.get_tensor(name).astype(np.float32, copy=False)


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


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise InputError(f"shard {path} is missing", "download the model again") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or not a safetensors file ({error})", "download it again") from None
