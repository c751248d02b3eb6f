"""Between TensorStore and S3 of moto: passes requests on, counts them, and does the faults of ``gcs_server``."""

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from gcs_server import Fault


class S3Proxy(ThreadingHTTPServer):
    """The proxy of the server at ``target``; ``requests`` holds method and path of each request, in order."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = urlsplit(target)
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are not worth a traceback."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 20
    server: S3Proxy

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""

    def handle_expect_100(self) -> bool:
        answered = super().handle_expect_100()
        self.wfile.flush()  # else curl waits a second before every upload
        return answered

    def handle_one(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.requests.append((self.command, urlsplit(self.path).path))
        if not any(fault(self) for fault in list(self.server.faults)):
            self.answer(*self.store())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

    def store(self) -> tuple[int, list[tuple[str, str]], bytes]:
        """Have the server carry the request out; its answer."""
        connection = http.client.HTTPConnection(self.server.target.hostname, self.server.target.port, timeout=30)
        try:
            connection.request(self.command, self.path, self.body, dict(self.headers.items()))
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def answer(self, code: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(code)
        own = {"connection", "transfer-encoding", "content-length"}
        for name, value in headers:
            if name.lower() not in own or (name.lower() == "content-length" and self.command == "HEAD"):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def refuse(self, code: int) -> None:
        self.answer(code, [], b"")
