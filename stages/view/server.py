"""A server on this machine alone: the index, and the page of any feature rendered when it is asked for."""

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.feature_cache import FeatureCache
from saex_pipe.stages.view.page import feature_page

ADDRESS = "127.0.0.1"
_LARGEST_DIGITS = 10  # of a feature number; int() of a huge string is slow


class _NoSuchPageError(Exception):
    """What was asked for does not exist; the text says what does."""


class _Server(ThreadingHTTPServer):
    # Threads, since browsers open connections ahead of need that would block a server of one.
    daemon_threads = True


def open_server(cache: FeatureCache, index: str, port: int) -> ThreadingHTTPServer:
    """A server bound to ``port`` of this machine (0: a free one), showing ``index`` at / and any feature of ``cache``.

    Raises an InputError when the port is taken or not allowed.
    """
    lock = threading.Lock()

    def page(path: str) -> str:
        if path in ("/", "/index.html"):
            return index
        with lock:  # the cache's readers are not safe to share
            return feature_page(cache, _feature_number(path, len(cache)))

    try:
        return _Server((ADDRESS, port), _handler(page))
    except OSError as error:
        raise InputError(
            f"view.port = {port} cannot be opened on {ADDRESS} ({error.strerror})",
            "choose another with --set port=..., or 0 for any free one",
        ) from None


def serve(cache: FeatureCache, index: str, port: int) -> None:
    """Serve until Ctrl-C, printing the address first."""
    with open_server(cache, index, port) as server:
        try:
            print(f"http://{ADDRESS}:{server.server_port}/  (Ctrl-C ends)", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _feature_number(path: str, features: int) -> int:
    name, _, number = path.removeprefix("/").partition("/")
    limit = f"features are /feature/0 to /feature/{features - 1}" if features else "the cache holds no features"
    if name != "feature":
        raise _NoSuchPageError(f"There is no page {path}; the index is / and {limit}.")
    if not (number.isascii() and number.isdigit() and len(number) <= _LARGEST_DIGITS) or int(number) >= features:
        raise _NoSuchPageError(f"There is no feature {number!r}; {limit}.")
    return int(number)


def _handler(page: Callable[[str], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version = "saex-pipe"
        sys_version = ""

        def do_GET(self) -> None:
            # A page elsewhere could point its own host name here and read along; it cannot forge the Host header.
            if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in (ADDRESS, "localhost"):
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", f"This server answers at {ADDRESS} and localhost.")
                return
            address = urlsplit(self.path)
            wanted = parse_qs(address.query).get("n", [""])[0]
            if address.path == "/feature" and wanted.isascii() and wanted.isdigit():
                self._answer(
                    HTTPStatus.SEE_OTHER, "text/plain", "", location=f"/feature/{int(wanted[:_LARGEST_DIGITS])}"
                )
                return
            try:
                self._answer(HTTPStatus.OK, "text/html", page(address.path))
            except _NoSuchPageError as error:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", str(error))
            except InputError as error:
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", str(error))

        def _answer(self, status: HTTPStatus, kind: str, text: str, location: str | None = None) -> None:
            data = text.encode("utf-8", errors="replace")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cache-Control", "no-store")
            if location is not None:
                self.send_header("Location", location)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing about each request."""

    return Handler
