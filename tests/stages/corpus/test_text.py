import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from saex_pipe.common.errors import InputError
from saex_pipe.stages.corpus.text import check_source, plain_text, read_documents

TEXTS = ["first\nline two", "zweites ä", ""]


def encoded(suffix):
    if suffix == ".txt":
        return TEXTS[0].encode()
    if suffix == ".jsonl":
        return "".join(json.dumps({"id": i, "body": text}) + "\n\n" for i, text in enumerate(TEXTS)).encode()
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": [1, 2, 3], "body": TEXTS}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_format_is_read(tmp_path, suffix, compression):
    data = encoded(suffix)
    data = {"": lambda d: d, ".gz": gzip.compress, ".zst": zstandard.compress}[compression](data)
    path = tmp_path / f"text{suffix}{compression}"
    path.write_bytes(data)
    assert list(read_documents(str(path), plain_text("body"))) == (TEXTS[:1] if suffix == ".txt" else TEXTS)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"body": "x"}\n{"body"\n', "line 2 is not JSON; give one JSON object a line"),
        (
            "a.jsonl",
            b'{"text": "x"}\n',
            "line 1 has no text in field 'body'; set corpus.text_field; its fields are text",
        ),
        ("a.jsonl", b"[1]\n", "line 1 has no text in field 'body'"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(encoded(".jsonl"))[:-20], "cannot be read"),
        ("a.jsonl.gz", b"plain", "cannot be read"),
        ("a.jsonl.zst", zstandard.compress(encoded(".jsonl") * 50)[:-3], "cannot be read"),
        ("a.parquet", b"PAR1 not really", "cannot be read"),
        ("a.parquet", encoded(".parquet")[:-4], "cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        list(read_documents(str(tmp_path / name), plain_text("body")))


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    (tmp_path / "a.parquet").write_bytes(encoded(".parquet"))
    with pytest.raises(InputError, match=r"no column 'text'; set corpus.text_field; its columns are id, body"):
        list(read_documents(str(tmp_path / "a.parquet"), plain_text("text")))


def test_endings_are_known_or_refused():
    assert check_source("gs://b/x.JSONL.gz#sha256=ab") == ".jsonl"
    with pytest.raises(InputError, match=r"has no known ending; use .txt, .jsonl, .parquet"):
        check_source("x.csv")
