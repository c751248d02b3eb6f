"""A folder of whole objects on a local disk, ``gs://`` or ``s3://``, through TensorStore's key-value stores.

Every write is one object, atomic and durable when the call returns: on a local disk a temporary file,
fsync and rename (``local_disk``); on an object store a single PUT.

Another S3 than Amazon's is named by ``SAEX_S3_ENDPOINT`` (``http://host:port``), with its region in ``AWS_REGION`` and
the credentials in the environment; for GCS, TensorStore reads ``TENSORSTORE_GCS_HTTP_URL``. A request that a store
refuses for the time being (429, 5xx, a connection that breaks) is repeated ``SAEX_REQUEST_RETRIES`` times, 16 where
that is not set: with waits that double from ``SAEX_RETRY_SECONDS`` (0.5) to half a minute, for some five minutes.
"""

import io
import os
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import tensorstore as ts
from jaxtyping import UInt8

from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.local_disk import can_write, file_version, make_folders, sync_folder, write_file

_SCHEMES = ("gs://", "s3://")
_REQUESTS = 64  # at once


class Stamped(NamedTuple):
    """An object (None where there is none) and what tells whether it has changed since."""

    data: bytes | None
    generation: bytes


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
                self._opened = ts.KvStore.open(self.kvstore_spec(), context=ts.Context(self.context)).result()
            except (ValueError, OSError) as error:
                explain_storage_error(error, self.uri, "opened")
        return self._opened

    def kvstore_spec(self, name: str = "") -> dict[str, Any]:
        """TensorStore's specification of this folder, or of the sub-folder ``name``."""
        local = self.local_path()
        if local is not None:
            return {"driver": "file", "path": f"{local}/{name}/" if name else f"{local}/"}
        scheme, _, place = self.uri.partition("://")
        bucket, _, path = place.partition("/")
        found: dict[str, Any] = {
            "driver": {"gs": "gcs", "s3": "s3"}[scheme],
            "bucket": bucket,
            "path": "/".join([*filter(None, (path, name)), ""]),
        }
        if scheme == "s3" and (endpoint := os.environ.get("SAEX_S3_ENDPOINT")):
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
            found |= {"endpoint": endpoint, "aws_region": region, "aws_credentials": {"type": "environment"}}
        return found

    @property
    def context(self) -> dict[str, Any]:
        """TensorStore's settings for requests to this folder."""
        retries = {
            "max_retries": int(os.environ.get("SAEX_REQUEST_RETRIES", "16")),
            "initial_delay": f"{os.environ.get('SAEX_RETRY_SECONDS', '0.5')}s",
            "max_delay": "32s",
        }
        return {"gcs_request_retries": retries, "s3_request_retries": retries}

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
        self.write_pieces(name, [np.frombuffer(data, np.uint8)])

    def version(self, name: str) -> bytes:
        """What tells ``write_pieces`` whether object ``name`` has changed since, which may be absent."""
        local = self.local_path()
        return file_version(local / name) if local is not None and can_write() else self.generation(name)

    def write_pieces(self, name: str, pieces: Sequence[UInt8[np.ndarray, " bytes"]], over: bytes | None = None) -> bool:
        """Write object ``name`` whole from the bytes of ``pieces``; on a local disk they are not copied.

        With ``over`` only where it is still of that ``version``. An answer that was lost makes a repeated request fail
        although the first one has succeeded: what is there counts as written where it is just that.

        Returns:
            Whether it was written: False where there is another version.
        """
        local = self.local_path()
        try:
            if local is not None and can_write():
                return write_file(local / name, pieces, over)
            data = b"".join(piece.data for piece in pieces)
            if over is None:
                self.objects.write(name, data).result()
                return True
            if self.objects.write(name, data, if_equal=over).result().generation:
                return True
        except (ValueError, OSError) as error:
            explain_storage_error(error, f"{self.uri}/{name}", "written")
        return self.read(name) == data

    def make(self, name: str) -> None:
        """Make the sub-folder ``name``, durably, for others to write to; an object store has none to make."""
        local = self.local_path()
        if local is None:
            return
        try:
            for grown in make_folders(local / name):
                sync_folder(grown)
        except OSError as error:
            explain_storage_error(error, f"{self.uri}/{name}", "created")

    def read_stamped(self, name: str) -> Stamped:
        """The bytes of object ``name`` with the generation that they are of."""
        try:
            result = self.objects.read(name).result()
        except (ValueError, OSError) as error:
            explain_storage_error(error, f"{self.uri}/{name}", "read")
        return Stamped(bytes(result.value) if result.state == "value" else None, bytes(result.stamp.generation))

    def write_if(self, name: str, data: bytes, generation: bytes) -> bytes | None:
        """Write object ``name`` if it is still of ``generation``.

        When the answer to a request that succeeded is lost, the request is repeated and fails: so what is there is
        read back, and counts as written where it is ``data``. Writers that must be told apart put their name into it.

        Returns:
            The new generation, None where another has written since.
        """
        try:
            written = bytes(self.objects.write(name, data, if_equal=generation).result().generation)
        except (ValueError, OSError) as error:
            explain_storage_error(error, f"{self.uri}/{name}", "written")
        if written:
            return written
        found = self.read_stamped(name)
        return found.generation if found.data == data else None

    def delete_if(self, name: str, generation: bytes) -> bool:
        """Delete object ``name`` if it is still of ``generation``; whether it was."""
        try:
            return bool(self.objects.write(name, None, if_equal=generation).result().generation)
        except (ValueError, OSError) as error:
            explain_storage_error(error, f"{self.uri}/{name}", "deleted")

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        """The bytes of those of ``names`` that are there, many requests at once."""
        found, pending = {}, list(reversed(names))
        started: deque[tuple[str, Any]] = deque()
        while started or pending:
            while pending and len(started) < _REQUESTS:
                started.append((pending[-1], self.objects.read(pending.pop())))
            name, request = started.popleft()
            try:
                result = request.result()
            except (ValueError, OSError) as error:
                explain_storage_error(error, f"{self.uri}/{name}", "read")
            if result.state == "value":
                found[name] = bytes(result.value)
        return found

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
    if uri.startswith(_SCHEMES):
        _explain_refused_request(text, uri, action)
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


def _explain_refused_request(text: str, uri: str, action: str) -> None:
    """Raise what an object store's refusal means, where it is one."""
    if any(word in text for word in ("NoSuchBucket", "bucket does not exist")):
        raise InputError(f"{uri} could not be {action}: there is no such bucket", "create it, or choose another")
    if any(word in text for word in ("http_response_code='401'", "http_response_code='403'", "UNAUTHENTICATED")):
        raise InputError(f"{uri} could not be {action}: the store refuses these credentials", "log in, or use others")
    if "retry attempts failed" in text or "CURL error" in text:
        raise SaexError(
            f"{uri} could not be {action}: the store does not answer ({text.splitlines()[0][:160]}); "
            "run the same command again when it does"
        )
