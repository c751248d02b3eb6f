"""Documents from text files: .txt, .jsonl and .parquet, each also compressed with gzip or Zstandard."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from saex_pipe.common import resources
from saex_pipe.common.errors import InputError

_FORMATS = (".txt", ".jsonl", ".parquet")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def check_source(uri: str) -> str:
    """The format of ``uri`` by its name; an InputError when it is none of the known ones."""
    name = uri.partition("#")[0].lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    for suffix in _FORMATS:
        if name.endswith(suffix):
            return suffix
    raise InputError(
        f"corpus.source {uri!r} has no known ending",
        f"use {', '.join(_FORMATS)}, each alone or with {' or '.join(_COMPRESSIONS)}",
    )


def read_documents(uri: str, text_field: str) -> Iterator[str]:
    """The texts of the documents of one source, in file order."""
    suffix = check_source(uri)
    path = resources.fetch(uri)
    try:
        with _open(path, uri) as file:
            if suffix == ".txt":
                yield file.read().decode()
            elif suffix == ".jsonl":
                yield from _json_lines(file, uri, text_field)
            else:
                yield from _parquet_rows(file, uri, text_field)
    except (EOFError, UnicodeDecodeError, OSError) as error:
        raise InputError(
            f"{uri} cannot be read ({error})", "check that the file is whole and of the kind its name says"
        ) from None


@contextlib.contextmanager
def _open(path: Path, uri: str) -> Iterator[IO[bytes]]:
    """The file, decompressed. pyarrow is used for both compressions: it refuses a stream that ends early."""
    import pyarrow

    suffix = "." + uri.partition("#")[0].lower().rpartition(".")[2]
    with pyarrow.input_stream(str(path), compression=_COMPRESSIONS.get(suffix)) as stream:
        yield cast(IO[bytes], io.BufferedReader(stream, 1 << 20))


def _json_lines(file: IO[bytes], uri: str, text_field: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise InputError(f"{uri}: line {number} is not JSON", "give one JSON object a line") from None
        yield _text_of(record, uri, number, text_field)


def _text_of(record: Any, uri: str, number: int, text_field: str) -> str:
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(record) if isinstance(record, dict) else "none"
        raise InputError(
            f"{uri}: line {number} has no text in field {text_field!r}",
            f"set corpus.text_field; its fields are {fields}",
        )
    # JSON can spell half of a surrogate pair, which is no text.
    return text.encode("utf-8", "replace").decode()


def _parquet_rows(file: IO[bytes], uri: str, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if not file.seekable() else file)
    except pyarrow.ArrowInvalid as error:
        raise EOFError(str(error)) from None
    if text_field not in table.schema_arrow.names:
        raise InputError(
            f"{uri} has no column {text_field!r}",
            f"set corpus.text_field; its columns are {', '.join(table.schema_arrow.names)}",
        )
    kind = table.schema_arrow.field(text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise InputError(
            f"{uri}: column {text_field!r} holds {kind}, not text", "set corpus.text_field to one of strings"
        )
    try:
        for batch in table.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                yield text or ""
    except pyarrow.ArrowInvalid as error:
        raise EOFError(str(error)) from None
