"""bfloat16 for zarr-python, which has none: with saex-pipe installed, any zarr user opens the stores.

Registered through the entry point ``zarr.data_type`` in pyproject.toml. zarr 3.1, the last for Python 3.11, lists those
entry points and never loads them, but loads those of ``zarr.buffer`` before it opens a group: there this module gives
zarr's own ``Buffer`` once more, so that it is imported, which registers the type. An array that is opened there by
itself, before any group, needs ``import saex_pipe.common.formats.zarr_bfloat16``.
"""

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import ml_dtypes
import numpy as np
from zarr.core.buffer.cpu import Buffer
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.core.dtype.npy.common import float_from_json_v3, float_to_json_v3
from zarr.core.dtype.wrapper import ZDType

_home = importlib.import_module("zarr.errors")
if not hasattr(_home, "DataTypeValidationError"):  # zarr 3.1, the last for Python 3.11
    _home = importlib.import_module("zarr.dtype")
DataTypeValidationError: type[Exception] = _home.DataTypeValidationError

__all__ = ["BFloat16", "Buffer"]

_NATIVE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType, HasEndianness, HasItemSize):
    """The Zarr v3 data type "bfloat16" as NumPy's ml_dtypes.bfloat16. Zarr v2 has no name for it."""

    dtype_cls = type(_NATIVE)
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        """The type of NumPy arrays of bfloat16."""
        if dtype == _NATIVE:
            return cls()
        raise DataTypeValidationError(f"{dtype} is not bfloat16")

    def to_native_dtype(self) -> np.dtype[Any]:
        """NumPy's type."""
        return _NATIVE

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError(f"Zarr v2 has no bfloat16 (found {data})")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"{data} is not bfloat16")

    def to_json(self, zarr_format: int) -> Any:
        """The name in the metadata."""
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, float | int | np.floating | np.integer | ml_dtypes.bfloat16)

    def cast_scalar(self, data: Any) -> Any:
        """A number as a bfloat16."""
        return ml_dtypes.bfloat16(data)

    def default_scalar(self) -> Any:
        """Zero."""
        return ml_dtypes.bfloat16(0)

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> Any:
        """A fill value from the metadata: a number, or a string such as "NaN"."""
        return ml_dtypes.bfloat16(float_from_json_v3(data) if isinstance(data, str) else float(data))

    def to_json_scalar(self, data: Any, *, zarr_format: int) -> Any:
        """A fill value for the metadata."""
        return float_to_json_v3(float(data))

    @property
    def item_size(self) -> int:
        """Bytes of one number."""
        return _NATIVE.itemsize


data_type_registry.register("bfloat16", BFloat16)
