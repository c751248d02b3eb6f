"""A small Google Cloud Storage on loopback, in memory: what TensorStore uses of its JSON API, and faults on demand.

It honours generation preconditions and suffix ranges, which the packaged emulators do not. ``faults`` is a list of
functions that are asked in turn before a request is answered; one that returns False was not meant for this request.
"""

import base64
import itertools
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

Fault = Callable[["Handler"], bool]


class GcsServer(ThreadingHTTPServer):
    """The server; ``objects`` holds bytes and generation by bucket and name."""

    daemon_threads = True
    request_queue_size = 256  # the default of 5 drops connections for seconds

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.generations = itertools.count(1_700_000_000_000_000)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are not worth a traceback."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 20
    server: GcsServer

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""

    def handle_expect_100(self) -> bool:
        answered = super().handle_expect_100()
        self.wfile.flush()  # else curl waits a second before every upload
        return answered

    def answer(self, code: int, body: bytes = b"", **headers: Any) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def refuse(self, code: int) -> None:
        self.answer(code, b"" if code == 304 else json.dumps({"error": {"code": code}}).encode())

    def read_body(self) -> bytes:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self.body

    def begin(self) -> bool:
        """Take the request apart; False where a fault has dealt with it."""
        parts = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.steps = parts.path.split("/")
        self.read_body()
        self.server.requests.append((self.command, self.path))
        return not any(fault(self) for fault in list(self.server.faults))

    def refused_by_precondition(self, current: tuple[bytes, int] | None) -> int:
        generation = 0 if current is None else current[1]
        if int(self.query.get("ifGenerationMatch", generation)) != generation:
            return 412
        return 304 if int(self.query.get("ifGenerationNotMatch", -1)) == generation else 0

    def store(self) -> bytes | int:
        """Carry an upload out; its answer, or the status it is refused with."""
        bucket, name = self.steps[5], self.query["name"]
        with self.server.lock:
            code = self.refused_by_precondition(self.server.objects.get((bucket, name)))
            if code:
                return code
            generation = next(self.server.generations)
            self.server.objects[bucket, name] = self.body, generation
        return self.described(bucket, name, self.body, generation)

    @staticmethod
    def described(bucket: str, name: str, data: bytes, generation: int) -> bytes:
        checksum = base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
        moment = "2026-01-01T00:00:00.000Z"
        found = {"kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(data)), "crc32c": checksum}
        times = {"timeCreated": moment, "updated": moment}
        return json.dumps(found | times | {"generation": str(generation), "metageneration": "1"}).encode()

    def do_POST(self) -> None:
        if self.begin():
            done = self.store()
            self.refuse(done) if isinstance(done, int) else self.answer(200, done)

    def do_GET(self) -> None:
        if not self.begin():
            return
        bucket = self.steps[4]
        if len(self.steps) <= 6 or not self.steps[6]:
            self.answer(200, self.listing(bucket))
            return
        current = self.server.objects.get((bucket, self.object_name()))
        if current is None:
            return self.refuse(404)
        if code := self.refused_by_precondition(current):
            return self.refuse(code)
        data, generation = current
        headers = {"x-goog-generation": generation, "Content-Type": "application/octet-stream"}
        if self.query.get("alt") != "media":
            return self.answer(200, self.described(bucket, self.object_name(), data, generation))
        if "Range" not in self.headers:
            return self.answer(200, data, **headers)
        wanted = self.range_of(len(data))
        if wanted.start >= len(data):
            return self.refuse(416)
        content = f"bytes {wanted.start}-{wanted.stop - 1}/{len(data)}"
        return self.answer(206, data[wanted.start : wanted.stop], Content_Range=content, **headers)

    def object_name(self) -> str:
        """Of the object that is asked for."""
        return unquote("/".join(self.steps[6:]))

    def range_of(self, size: int) -> range:
        """The bytes that are asked for of an object of ``size``."""
        first, last = self.headers.get("Range", "bytes=0-").split("=")[1].split("-")
        start = int(first) if first else max(0, size - int(last))
        return range(start, min(size, int(last) + 1) if first and last else size)

    def listing(self, bucket: str) -> bytes:
        """One page of at most 50 objects."""
        start = max(self.query.get("startOffset", ""), self.query.get("pageToken", ""))
        stop, prefix = self.query.get("endOffset"), self.query.get("prefix", "")
        with self.server.lock:
            names = sorted(name for where, name in self.server.objects if where == bucket and name.startswith(prefix))
            names = [name for name in names if name >= start and (not stop or name < stop)]
            items = [(name, *self.server.objects[bucket, name]) for name in names[:50]]
        found: dict[str, Any] = {"kind": "storage#objects"}
        found["items"] = [{"name": n, "generation": str(g), "size": str(len(data))} for n, data, g in items]
        return json.dumps(found | ({"nextPageToken": names[50]} if len(names) > 50 else {})).encode()

    def do_DELETE(self) -> None:
        if not self.begin():
            return
        key = self.steps[4], self.object_name()
        with self.server.lock:
            current = self.server.objects.get(key)
            code = 404 if current is None else self.refused_by_precondition(current)
            if not code:
                del self.server.objects[key]
        self.refuse(code) if code else self.answer(204)


def times(number: int, fault: Callable[[Handler], None], method: str = "") -> Fault:
    """A fault that happens to the next ``number`` requests (of one method)."""
    left = [number]

    def happen(handler: Handler) -> bool:
        if left[0] == 0 or (method and handler.command != method):
            return False
        left[0] -= 1
        fault(handler)
        return True

    return happen


def status(code: int) -> Callable[[Handler], None]:
    return lambda handler: handler.refuse(code)


def reset(handler: Handler) -> None:
    """Break the connection without a word."""
    handler.close_connection = True
    handler.connection.close()


def stall(handler: Handler) -> None:
    """Say nothing for a while, then that it is too late."""
    time.sleep(1.0)
    handler.refuse(503)


def lose_answer(handler: Handler) -> None:
    """Carry a write out, and break the connection before it is answered."""
    if handler.command in ("POST", "PUT"):
        handler.store()
    reset(handler)
