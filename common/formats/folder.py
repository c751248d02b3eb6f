"""A folder of whole objects on a local disk, ``gs://`` or ``s3://``, through TensorStore's key-value stores.

Every write is one object, atomic and durable when the call returns: on a local disk a temporary file,
fsync and rename; on an object store a single PUT.
"""

import io
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import numpy as np
import tensorstore as ts

from saex_pipe.common.errors import InputError, SaexError

_SCHEMES = ("gs://", "s3://")


class Folder:
    """The folder at ``uri``. It need not exist: reading gives nothing, writing creates it."""

    def __init__(self, uri: str) -> None:
        if "://" in uri and not uri.startswith((*_SCHEMES, "file://")):
            scheme = uri.partition("://")[0]
            raise InputError(f"{uri!r}: a folder cannot be at {scheme}://", "use a local path, gs:// or s3://")
        self.uri = uri.removeprefix("file://").rstrip("/") or "/"
        self._opened: Any = None

    @property
    def objects(self) -> Any:
        """The key-value store itself, for requests that overlap; a failed one goes to ``explain_storage_error``."""
        if self._opened is None:
            try:
                self._opened = ts.KvStore.open(self.kvstore_spec()).result()
            except (ValueError, OSError) as error:
                explain_storage_error(error, self.uri, "opened")
        return self._opened

    def kvstore_spec(self, name: str = "") -> str:
        """The TensorStore URL of this folder, or of the sub-folder ``name``."""
        local = self.local_path()
        base = f"file://{quote(str(local))}" if local is not None else self.uri
        name = quote(name) if local is not None else name
        return f"{base}/{name}/" if name else f"{base}/"

    def local_path(self) -> Path | None:
        """The absolute path on the local disk, None on an object store."""
        return None if self.uri.startswith(_SCHEMES) else Path(os.path.abspath(os.path.expanduser(self.uri)))

    def child(self, name: str) -> "Folder":
        """The sub-folder ``name``."""
        return Folder(f"{self.uri}/{name}")

    def read(self, name: str) -> bytes | None:
        """The bytes of object ``name``, None where there is none."""
        try:
            result = self.objects.read(name).result()
        except (ValueError, OSError) as error:
            explain_storage_error(error, f"{self.uri}/{name}", "read")
        return bytes(result.value) if result.state == "value" else None

    def generation(self, name: str) -> bytes:
        """What tells whether object ``name`` has changed since; an object that is not there has one, too."""
        try:
            return bytes(self.objects.read(name, byte_range=slice(0, 0)).result().stamp.generation)
        except (ValueError, OSError) as error:
            explain_storage_error(error, f"{self.uri}/{name}", "read")

    def write(self, name: str, data: bytes) -> None:
        """Write object ``name`` whole: readers see the old bytes or the new, never a part."""
        try:
            self.objects.write(name, data).result()
        except (ValueError, OSError) as error:
            explain_storage_error(error, f"{self.uri}/{name}", "written")

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write named arrays whole, as one ``.npz`` object."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        self.write(name, buffer.getvalue())

    def read_arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """Arrays written by ``write_arrays``, None where there is no such object."""
        data = self.read(name)
        if data is None:
            return None
        with np.load(io.BytesIO(data)) as arrays:
            return dict(arrays)

    def list(self, prefix: str = "") -> list[str]:
        """Names of all objects whose name starts with ``prefix``, sorted, sub-folders included."""
        if (local := self.local_path()) is not None and not local.exists():
            return []
        try:
            keys = self.objects.list(ts.KvStore.KeyRange(prefix, _after(prefix))).result()
        except (ValueError, OSError) as error:
            explain_storage_error(error, self.uri, "listed")
        return sorted(key.decode() for key in keys)

    def delete(self, prefix: str = "") -> None:
        """Delete every object whose name starts with ``prefix``; on a local disk no empty folders stay of them."""
        if (local := self.local_path()) is not None and not local.exists():
            return
        try:
            self.objects.delete_range(ts.KvStore.KeyRange(prefix, _after(prefix))).result()
        except (ValueError, OSError) as error:
            explain_storage_error(error, self.uri, "deleted")
        if local is not None:
            for place, _, _ in os.walk(local / os.path.dirname(prefix), topdown=False):
                if place != str(local) and f"{os.path.relpath(place, local)}/".startswith(prefix):
                    with suppress(OSError):  # not empty
                        os.rmdir(place)


def _after(prefix: str) -> bytes:
    """The first key after all keys that start with ``prefix`` ("" stands for no bound)."""
    return prefix.encode() + b"\xff" if prefix else b""


def explain_storage_error(error: Exception, uri: str, action: str) -> NoReturn:
    """Raise what a failed storage operation means to the user, in one line."""
    text = str(error).partition(" [tensorstore_spec")[0].partition(" [source locations")[0]
    if any(word in text for word in ("PERMISSION_DENIED", "Permission denied", "Read-only file system")):
        raise InputError(f"{uri} could not be {action}: no permission", "change its rights or choose another --out")
    if any(word in text for word in ("No space left", "Disk quota exceeded")):
        raise InputError(
            f"{uri} could not be {action}: the disk is full", "free some space and run the same command again"
        )
    if any(word in text for word in ("Not a directory", "non-directory", "Is a directory", "File exists")):
        raise InputError(f"{uri} could not be {action}: a file is in its way", "move that file or choose another --out")
    if "File too large" in text:
        raise InputError(
            f"{uri} could not be {action}: files may not grow that large here", "raise the limit (ulimit -f)"
        )
    if action == "opened" and "NOT_FOUND" in text:
        raise SaexError(f"{uri} is missing or lacks its zarr.json; delete the stage's folder and run it again")
    if "DATA_LOSS" in text or "checksum" in text.lower():
        raise SaexError(f"{uri} is damaged ({text.splitlines()[0][:160]}); delete the stage's folder and run it again")
    raise SaexError(f"{uri} could not be {action}: {text.splitlines()[0][:300]}")
