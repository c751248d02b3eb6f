"""Documents from text files: .txt, .jsonl and .parquet, each also compressed with gzip or Zstandard."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from saex_pipe.common import resources
from saex_pipe.common.errors import InputError

_FORMATS = (".txt", ".jsonl", ".parquet")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def check_source(uri: str, *, with_fields: bool = False) -> str:
    """The format of ``uri`` by its name; an InputError when it is none of the known ones, or lacks wanted fields."""
    name = uri.partition("#")[0].lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    for suffix in _FORMATS:
        if name.endswith(suffix):
            if with_fields and suffix == ".txt":
                raise InputError(f"corpus.source {uri!r} has no field for messages", "give .jsonl or .parquet")
            return suffix
    raise InputError(
        f"corpus.source {uri!r} has no known ending",
        f"use {', '.join(_FORMATS)}, each alone or with {' or '.join(_COMPRESSIONS)}",
    )


class Content(NamedTuple):
    """What a document is made of."""

    field: str  # or column
    setting: str  # that names the field
    noun: str
    to_text: Callable[[Any], str]  # a ValueError says why a value gives no text


def plain_text(field: str) -> Content:
    """Documents that are text as they are."""
    return Content(field, "text_field", "text", _as_text)


def conversations(field: str, render: Callable[[Any], str]) -> Content:
    """Documents that are lists of messages, which ``render`` writes out (see ``ChatTemplate.render``)."""
    return Content(field, "chat_field", "messages", render)


def read_documents(uri: str, content: Content) -> Iterator[str]:
    """The texts of the documents of one source, in file order."""
    suffix = check_source(uri)
    path = resources.fetch(uri)
    try:
        with _open(path, uri) as file:
            if suffix == ".txt":
                yield file.read().decode()
            elif suffix == ".jsonl":
                yield from _json_lines(file, uri, content)
            else:
                yield from _parquet_rows(file, uri, content)
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


def _json_lines(file: IO[bytes], uri: str, content: Content) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise InputError(f"{uri}: line {number} is not JSON", "give one JSON object a line") from None
        value = record.get(content.field) if isinstance(record, dict) else None
        if value is None:
            fields = ", ".join(record) if isinstance(record, dict) else "none"
            raise InputError(
                f"{uri}: line {number} has no {content.noun} in field {content.field!r}",
                f"set corpus.{content.setting}; its fields are {fields}",
            )
        yield _text_of(value, content, f"{uri}: line {number}")


def _parquet_rows(file: IO[bytes], uri: str, content: Content) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if not file.seekable() else file)
    except pyarrow.ArrowInvalid as error:
        raise EOFError(str(error)) from None
    if content.field not in table.schema_arrow.names:
        raise InputError(
            f"{uri} has no column {content.field!r}",
            f"set corpus.{content.setting}; its columns are {', '.join(table.schema_arrow.names)}",
        )
    number = 0
    try:
        for batch in table.iter_batches(columns=[content.field]):
            for value in batch.column(0).to_pylist():
                number += 1
                empty = value is None and content.to_text is _as_text
                yield "" if empty else _text_of(value, content, f"{uri}: row {number}")
    except pyarrow.ArrowInvalid as error:
        raise EOFError(str(error)) from None


def _text_of(value: Any, content: Content, where: str) -> str:
    try:
        text = content.to_text(value)
    except ValueError as error:
        raise InputError(
            f"{where}: {content.field!r} gives no text: {error}",
            f"correct or remove the document, or set corpus.{content.setting}",
        ) from None
    # JSON can spell half of a surrogate pair, which is no text.
    return text.encode("utf-8", "replace").decode()


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"it holds {type(value).__name__}, not text")
    return value
