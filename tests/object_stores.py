"""Object stores on loopback for tests: moto's S3 in a process of its own, and a GCS of the repository's."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from itertools import count

from gcs_server import GcsServer
from s3_proxy import S3Proxy

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",
    "SAEX_REQUEST_RETRIES": "5",
    "SAEX_RETRY_SECONDS": "0.05",
}


_NUMBERS = count()


def fresh(root: str) -> str:
    """A place below ``root`` that nothing was written to."""
    return f"{root}/{next(_NUMBERS)}"


@contextlib.contextmanager
def serve_s3() -> Iterator[str]:
    """moto's server with a bucket ``bucket``; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, env=os.environ | ENVIRONMENT, **quiet)
    try:
        request = urllib.request.Request(f"{url}/bucket", method="PUT")
        for attempt in range(200):
            try:
                urllib.request.urlopen(request, timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert attempt < 199, "moto's server does not start"
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def serve_gcs() -> Iterator[GcsServer]:
    """The GCS server, in a thread."""
    with GcsServer() as server, _served(server):
        yield server


@contextlib.contextmanager
def serve_proxy(target: str) -> Iterator[S3Proxy]:
    """A proxy of the S3 server at ``target``, in a thread."""
    with S3Proxy(target) as server, _served(server):
        yield server


@contextlib.contextmanager
def _served(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
