"""GGUF files: metadata and dequantised tensors. The only module that imports the ``gguf`` package.

The header is parsed here rather than by ``gguf.GGUFReader``, which builds a NumPy array for every string of the
vocabulary (3 s for 49,152 tokens, where this takes a tenth of one) and reports a truncated file as an index error.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.slabs import read_slabs
from saex_pipe.common.split_file import part_names

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DAMAGED = "get an intact copy of the file"


class TensorInfo(NamedTuple):
    """Where a tensor lies: ``shape`` is row-major, [out, in] for a matrix; ``offset`` counts from the file's start."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    path: Path  # the file, one of the parts of a split one
    offset: int
    size_bytes: int


class GgufFile:
    """A GGUF file: ``metadata`` and ``tensors`` are read at once, tensor data on ``read``.

    Any part of a split file opens all its parts, which lie beside it; the metadata is the first part's.

    Raises an ``InputError`` where a file or part is missing, not GGUF, of an unknown version, or truncated, and
    where the parts do not belong together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        here = _Header(path)
        self.metadata, self.tensors = here.metadata, here.tensors
        if here.metadata.get("split.count", 1) != 1:
            self._join(here)

    def read(self, name: str, dtype: Any = np.float32) -> np.ndarray:
        """One tensor dequantised to ``dtype``, row-major; the caller has checked that ``tensors`` holds ``name``.

        Takes little more memory than the result. Raises an ``InputError`` as ``check`` does.
        """
        self.check([name])
        info = self.tensors[name]
        return read_slabs(
            info.path,
            info.offset,
            info.shape,
            _row_bytes(info.shape[-1], info.type),
            lambda stored: dequantize(stored, info.type),
            np.dtype(dtype),
        )

    def check(self, names: Iterable[str]) -> None:
        """Raise an ``InputError`` that names the first tensor of a type that cannot be dequantised."""
        for name in names:
            kind = self.tensors[name].type
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                raise InputError(
                    f"{self.path}: tensor {name} is of type {kind.name}, which cannot be dequantised",
                    "use a file quantised to another type",
                ) from None

    def _join(self, here: "_Header") -> None:
        """Take the tensors of all parts together, ``here`` being the one that was asked for."""
        count = here.metadata["split.count"]
        names = part_names(self.path.name)
        if len(names) != count:
            raise InputError(
                f"{self.path} is part of a file split into {count}, and its name does not say so",
                f"give its parts the names they came with, NAME-00001-of-{count:05}.gguf and so on"
                if isinstance(count, int)
                else _DAMAGED,
            )
        self.tensors = {}
        for number, path in enumerate(self.path.with_name(name) for name in names):
            if not path.is_file():
                raise InputError(f"{path}, one of {count} parts, is missing", "put all parts in one folder")
            part = here if path == self.path else _Header(path)
            found = (part.metadata.get("split.no"), part.metadata.get("split.count"))
            if found != (number, count):
                raise InputError(
                    f"{path} is part {found[0]} of {found[1]} by its metadata (counted from 0), {number} by its name",
                    "give the parts the names they came with, or fetch them again",
                )
            if number == 0:
                self.metadata = part.metadata
            self.tensors |= part.tensors
        announced = self.metadata.get("split.tensors.count")
        if announced != len(self.tensors):
            raise InputError(
                f"the {count} parts of {self.path} hold {len(self.tensors)} tensors, the first announces {announced}",
                "fetch all parts again, from one place",
            )


class _Header:
    """``metadata`` and ``tensors`` of one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with open(path, "rb") as file:
                magic = file.read(4)
                if magic != _MAGIC:
                    raise InputError(f"{path} is not a GGUF file: it starts with {magic!r}, not {_MAGIC!r}", _DAMAGED)
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}", "check the path and its permissions") from None
        with self._data:
            try:
                self._parse()
            except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, RecursionError):
                raise InputError(f"{path} is truncated or damaged: its header does not parse", _DAMAGED) from None

    def _parse(self) -> None:
        version, tensor_count, field_count = struct.unpack_from("<IQQ", self._data, 4)
        if version not in _VERSIONS:
            raise InputError(f"{self._path} is GGUF version {version}", f"versions {_VERSIONS} are read")
        self._position = 24
        self.metadata: dict[str, Any] = {}
        for _ in range(field_count):
            name = self._string()
            self.metadata[name] = self._value(self._scalar("I"))
        found = list(self._tensor_infos(tensor_count))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise InputError(f"{self._path} is damaged: general.alignment = {alignment!r}", _DAMAGED)
        start = -(-self._position // alignment) * alignment
        self.tensors = {name: info._replace(offset=start + info.offset) for name, info in found}
        end = max((info.offset + info.size_bytes for info in self.tensors.values()), default=0)
        if end > len(self._data):
            raise InputError(
                f"{self._path} is truncated: {len(self._data)} bytes of the {end} that its header announces", _DAMAGED
            )

    def _tensor_infos(self, count: int) -> Iterator[tuple[str, TensorInfo]]:
        for _ in range(count):
            name = self._string()
            axes = self._scalar("I")
            shape = tuple(self._scalar("Q") for _ in range(axes))[::-1]
            code = self._scalar("I")
            offset = self._scalar("Q")
            try:
                kind = GGMLQuantizationType(code)
            except ValueError:
                raise InputError(f"{self._path}: tensor {name} has the unknown type {code}", "update gguf") from None
            block = GGML_QUANT_SIZES[kind][0]
            elements = int(np.prod(shape, dtype=np.float64))
            if elements > len(self._data) * 256 or not shape or shape[-1] % block:
                raise InputError(f"{self._path} is damaged: tensor {name} of shape {shape}", _DAMAGED)
            yield name, TensorInfo(shape, kind, self._path, offset, _row_bytes(elements, kind))

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._position)
        self._position += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._data, self._position)
        start = self._position + 8
        if start + length > len(self._data):
            raise struct.error
        self._position = start + length
        return self._data[start : start + length].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise InputError(f"{self._path} is damaged: metadata of unknown type {kind}", _DAMAGED)
        element = self._scalar("I")
        count = self._scalar("Q")
        if count > len(self._data):
            raise struct.error
        if element in _SCALARS:
            layout = f"<{count}{_SCALARS[element]}"
            values = struct.unpack_from(layout, self._data, self._position)
            self._position += struct.calcsize(layout)
            return list(values)
        return [self._value(element) for _ in range(count)]


def _row_bytes(elements: int, kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return elements // block * block_bytes
