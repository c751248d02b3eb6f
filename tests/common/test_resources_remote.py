"""Resources of the hub, against a loopback server that speaks its protocol, and of object stores, in memory."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from saex_pipe.common import resource_remote
from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.resources import fetch, identity

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights" * 1000,
    "pytorch_model.bin": b"not wanted",
    "tokenizer.json": b"{}",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    monkeypatch.setenv("SAEX_CACHE", str(tmp_path / "link"))  # a cache reached through a link is an ordinary case
    return tmp_path / "link"


class _Hub(http.server.BaseHTTPRequestHandler):
    """The endpoints of the hub that one repository, org/name, needs."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        for kind, root in (("models", "/org/name"), ("datasets", "/datasets/org/name")):
            api = f"/api/{kind}/org/name"
            if path in (f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                siblings = [{"rfilename": name, "size": len(FILES[name]), "blobId": "0" * 40} for name in FILES]
                return self.reply({"id": "org/name", "_id": "1", "sha": COMMIT, "siblings": siblings})
            if path == f"{api}/tree/{COMMIT}":
                tree = [{"type": "file", "path": name, "size": len(FILES[name]), "oid": "0" * 40} for name in FILES]
                return self.reply(tree)
            name = path.removeprefix(f"{root}/resolve/{COMMIT}/")
            if name in FILES:
                return self.reply(FILES[name])
        return self.reply(
            {}, status=404, code="RevisionNotFound" if path.startswith("/api/models/org/name/") else "RepoNotFound"
        )

    def reply(self, content, status=200, code=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def hub():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def on_hub(call, port, **environment):
    """Evaluate ``call`` in a process of its own, as the client reads its endpoint from the environment once."""
    script = (
        "from saex_pipe.common.errors import SaexError\n"
        "from saex_pipe.common.resources import fetch, identity\n"
        f"try: print({call})\n"
        "except SaexError as error: print(type(error).__name__, error)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = clean | {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        **environment,
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestHub:
    def test_a_model_is_its_weights_configuration_and_tokenizer(self, hub, cache):
        folder = Path(on_hub("fetch('hf://org/name')", hub.server_port))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            name: content for name, content in FILES.items() if name != "pytorch_model.bin"
        }
        hub.asked.clear()
        assert on_hub("fetch('hf://org/name')", hub.server_port) == str(folder)
        assert on_hub("identity('hf://org/name')", hub.server_port) == f"hf://org/name@{COMMIT}/"
        assert hub.asked == []

    @pytest.mark.parametrize("repo", ["org/name", "datasets/org/name", f"org/name@{COMMIT}"])
    def test_a_file(self, hub, repo):
        uri = f"hf://{repo}/config.json"
        sha256 = hashlib.sha256(FILES["config.json"]).hexdigest()
        bare = repo.partition("@")[0]
        assert on_hub(f"identity('{uri}')", hub.server_port) == f"hf://{bare}@{COMMIT}/config.json"
        path = on_hub(f"fetch('{uri}#sha256={sha256}')", hub.server_port)
        assert Path(path).read_bytes() == FILES["config.json"]
        hub.asked.clear()
        assert on_hub(f"fetch('{uri}#sha256={sha256}')", hub.server_port) == path
        assert hub.asked == []

    def test_another_checksum_is_refused_and_nothing_kept(self, hub, cache):
        said = on_hub(f"fetch('hf://org/name/config.json#sha256={'1' * 64}')", hub.server_port)
        assert said.startswith("InputError hf://org/name/config.json has sha256 ")
        assert "nothing was kept" in said
        assert FILES["config.json"] not in [path.read_bytes() for path in cache.rglob("*") if path.is_file()]

    @pytest.mark.parametrize(
        ("uri", "said"),
        [
            ("hf://org/name/confg.json", "org/name has no file confg.json; it has config.json"),
            ("hf://org/name@v9/config.json", "org/name has no revision 'v9'; name a branch, tag or commit"),
            ("hf://org/other", "the hub shows no model org/other; check the name"),
        ],
    )
    def test_what_is_not_there_is_named(self, hub, uri, said):
        answer = on_hub(f"fetch('{uri}')", hub.server_port)
        assert answer.startswith("InputError ")
        assert said in answer

    def test_offline(self):
        said = "SaexError hf://org/name is not in the cache and the hub cannot be reached; go online"
        assert on_hub("fetch('hf://org/name')", 9, HF_HUB_OFFLINE="1").startswith(said)

    def test_no_connection(self):
        assert on_hub("fetch('hf://org/name')", 9).startswith("SaexError hf://org/name cannot be reached (")


class _Bucket(MemoryFileSystem):
    """An object store in memory that, like a real one, tells a checksum of each object."""

    protocol = "bucket"
    store = {}  # noqa: RUF012 - fsspec keeps one for all instances
    pseudo_dirs = [""]  # noqa: RUF012

    def info(self, path, **options):
        found = super().info(path, **options)
        if found["type"] == "file":
            found["ETag"] = hashlib.md5(self.store[found["name"]].getvalue()).hexdigest()
        return found

    def find(self, path, **options):
        return {name.lstrip("/"): self.info(name) for name in super().find(path)}


@pytest.fixture
def bucket(monkeypatch):
    filesystem = _Bucket(skip_instance_cache=True)
    filesystem.store.clear()
    for name, content in FILES.items():
        filesystem.pipe(f"/bucket/model/{name}", content)
    filesystem.pipe("/bucket/model/sub/more.json", b"more")
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme: filesystem)
    return filesystem


@pytest.mark.parametrize("scheme", ["gs", "s3"])
class TestObjectStore:
    def test_an_object(self, bucket, scheme):
        uri = f"{scheme}://bucket/model/config.json"
        path = fetch(uri)
        assert path.read_bytes() == FILES["config.json"]
        assert identity(uri) == f"{uri}@{hashlib.md5(FILES['config.json']).hexdigest()}"
        bucket.open = None  # not read again
        assert fetch(uri) == path

    def test_an_object_that_changed_is_fetched_again(self, bucket, scheme):
        uri = f"{scheme}://bucket/model/config.json"
        before = identity(uri)
        fetch(uri)
        bucket.pipe("/bucket/model/config.json", b"new")
        assert identity(uri) != before
        assert fetch(uri).read_bytes() == b"new"

    def test_with_a_checksum_the_store_is_not_asked_again(self, bucket, scheme):
        uri = f"{scheme}://bucket/model/config.json#sha256={hashlib.sha256(FILES['config.json']).hexdigest()}"
        path = fetch(uri)
        bucket.info = None
        assert fetch(uri) == path
        assert identity(uri).startswith("sha256:")

    def test_another_checksum_is_refused_and_nothing_kept(self, bucket, scheme, cache):
        with pytest.raises(InputError, match=f"asked for was {'1' * 64}; nothing was kept"):
            fetch(f"{scheme}://bucket/model/config.json#sha256={'1' * 64}")
        assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]

    def test_a_prefix_is_a_folder(self, bucket, scheme, capsys):
        uri = f"{scheme}://bucket/model"
        folder = fetch(uri)
        found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert found == FILES | {"sub/more.json": b"more"}
        assert "0.0 of 0.0 MB" in capsys.readouterr().err
        before = identity(uri)
        bucket.pipe("/bucket/model/sub/more.json", b"else")
        assert identity(uri) != before
        with pytest.raises(InputError, match="is a folder and has no sha256"):
            fetch(f"{uri}#sha256={'1' * 64}")

    def test_what_is_not_there_is_named(self, bucket, scheme):
        with pytest.raises(InputError, match="bucket/none does not exist; check bucket and path"):
            fetch(f"{scheme}://bucket/none")

    @pytest.mark.parametrize(
        ("error", "kind", "message"),
        [
            (
                ConnectionError("no route\nto host"),
                SaexError,
                r"cannot be reached \(no route to host\); check the network",
            ),
            (RuntimeError(""), SaexError, r"cannot be reached \(RuntimeError\)"),
            (PermissionError("403"), InputError, "access denied; log in"),
        ],
    )
    def test_errors_of_the_client_become_one_line(self, bucket, scheme, error, kind, message):
        def fail(path):
            raise error

        bucket.info = fail
        with pytest.raises(SaexError, match=message) as caught:
            fetch(f"{scheme}://bucket/model")
        assert type(caught.value) is kind

    def test_without_the_extra(self, scheme, monkeypatch):
        def missing(scheme):
            raise ImportError("install it")

        monkeypatch.setattr(fsspec, "filesystem", missing)
        extra = resource_remote.STORE_EXTRAS[scheme]
        with pytest.raises(
            InputError, match=rf"takes the optional extra '{extra}', .*pip install 'saex-pipe\[{extra}\]'"
        ):
            fetch(f"{scheme}://bucket/model")
