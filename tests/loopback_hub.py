"""A server on this machine that speaks as much of the Hugging Face hub's protocol as fetching takes."""

import hashlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

COMMIT = "a" * 40


class Hub(http.server.ThreadingHTTPServer):
    """The repositories ``files`` by name; ``datasets/ORG/NAME`` is a data set."""

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.gated: set[str] = set()  # repositories that show their names, and their files to nobody
        self.private: set[str] = set()  # repositories that show nothing without a token
        self.cut: set[str] = set()  # files whose transfer breaks off
        self.asked: list[str] = []

    @property
    def environment(self) -> dict[str, str]:
        """What the client reads, once: a process of its own is needed."""
        clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        clean.pop("HF_TOKEN", None)
        endpoint = f"http://127.0.0.1:{self.server_port}"
        return clean | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}


@contextmanager
def serving(files: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """A running ``Hub``."""
    with Hub(files) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0].strip("/")
        for repo, files in self.server.files.items():
            kind, bare = (
                ("datasets", repo.removeprefix("datasets/")) if repo.startswith("datasets/") else ("models", repo)
            )
            if path.startswith((f"api/{kind}/{bare}/", f"{repo}/resolve/")):
                return self.answer(repo, f"api/{kind}/{bare}", path, files)
        return self.refuse(401, "RepoNotFound")

    def answer(self, repo, api, path, files):
        if repo in self.server.private:
            return self.refuse(401, "RepoNotFound")
        if path in (f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name, "size": len(files[name]), "blobId": "0" * 40} for name in files]
            return self.reply(json.dumps({"id": repo, "_id": "1", "sha": COMMIT, "siblings": siblings}).encode())
        if path == f"{api}/tree/{COMMIT}":
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
            return self.reply(json.dumps(tree).encode())
        if path.startswith("api/"):
            return self.refuse(404, "RevisionNotFound")
        if repo in self.server.gated:
            return self.refuse(403, "GatedRepo")
        name = path.removeprefix(f"{repo}/resolve/{COMMIT}/")
        if name in files:
            return self.reply(files[name], cut=name in self.server.cut)
        return self.refuse(404, "EntryNotFound")

    def reply(self, body, *, cut=False):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words):
        pass
