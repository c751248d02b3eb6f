"""Resources of the hub, against a loopback server that speaks its protocol, and of object stores, in memory."""

import hashlib
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from loopback_hub import COMMIT, serving

from saex_pipe.common import resource_remote
from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.resources import fetch, identity

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


@pytest.fixture
def hub():
    with serving({"org/name": dict(FILES), "datasets/org/name": dict(FILES)}) as hub:
        yield hub


def on_hub(call, hub, **environment):
    """Evaluate ``call`` in a process of its own, as the client reads its endpoint from the environment once."""
    script = (
        "from saex_pipe.common.errors import SaexError\n"
        "from saex_pipe.common.resources import fetch, identity\n"
        f"try: print({call})\n"
        "except SaexError as error: print(type(error).__name__, error)\n"
    )
    environment = hub.environment | environment
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestHub:
    def test_a_model_is_its_weights_configuration_and_tokenizer(self, hub, cache):
        folder = Path(on_hub("fetch('hf://org/name')", hub))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            name: content for name, content in FILES.items() if name != "pytorch_model.bin"
        }
        hub.asked.clear()
        assert on_hub("fetch('hf://org/name')", hub) == str(folder)
        assert on_hub("identity('hf://org/name')", hub) == f"hf://org/name@{COMMIT}/"
        assert hub.asked == []

    @pytest.mark.parametrize("repo", ["org/name", "datasets/org/name", f"org/name@{COMMIT}"])
    def test_a_file(self, hub, repo):
        uri = f"hf://{repo}/config.json"
        sha256 = hashlib.sha256(FILES["config.json"]).hexdigest()
        bare = repo.partition("@")[0]
        assert on_hub(f"identity('{uri}')", hub) == f"hf://{bare}@{COMMIT}/config.json"
        path = on_hub(f"fetch('{uri}#sha256={sha256}')", hub)
        assert Path(path).read_bytes() == FILES["config.json"]
        hub.asked.clear()
        assert on_hub(f"fetch('{uri}#sha256={sha256}')", hub) == path
        assert hub.asked == []

    def test_another_checksum_is_refused_and_nothing_kept(self, hub, cache):
        said = on_hub(f"fetch('hf://org/name/config.json#sha256={'1' * 64}')", hub)
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
        answer = on_hub(f"fetch('{uri}')", hub)
        assert answer.startswith("InputError ")
        assert said in answer

    def test_offline(self, hub):
        said = "SaexError hf://org/name is not in the cache and the hub cannot be reached; go online"
        assert on_hub("fetch('hf://org/name')", hub, HF_HUB_OFFLINE="1").startswith(said)

    def test_no_connection(self, hub):
        said = on_hub("fetch('hf://org/name')", hub, HF_ENDPOINT="http://127.0.0.1:9")
        assert said.startswith("SaexError hf://org/name cannot be reached (")

    def test_a_model_that_access_has_to_be_granted_to(self, hub, cache):
        hub.gated.add("org/name")
        said = on_hub("fetch('hf://org/name')", hub)
        assert said.startswith("InputError hf://org/name: access to org/name has to be granted; ask for it on its page")
        assert not list(cache.rglob("*.safetensors"))

    @pytest.mark.parametrize("token", [{}, {"HF_TOKEN": "hf_wrong"}])
    def test_a_model_that_takes_a_token(self, hub, token):
        hub.private.add("org/name")
        said = "InputError hf://org/name: the hub shows no model org/name; check the name, or set HF_TOKEN"
        assert on_hub("fetch('hf://org/name')", hub, **token).startswith(said)

    def test_a_transfer_that_breaks_off_leaves_nothing_whole(self, hub, cache):
        hub.cut.add("model.safetensors")
        said = on_hub("fetch('hf://org/name')", hub)
        assert said.startswith("SaexError hf://org/name cannot be reached (")
        assert "\n" not in said
        assert not list(cache.rglob("hf-complete/*"))
        hub.cut.clear()
        folder = Path(on_hub("fetch('hf://org/name')", hub))
        assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]

    def test_only_the_top_folder_and_one_set_of_weights(self, hub):
        more = ["chat_template.jinja", "consolidated.safetensors", "onnx/config.json", "x.gguf", "README.md"]
        hub.files["org/name"] |= dict.fromkeys(more, b"more")
        folder = Path(on_hub("fetch('hf://org/name')", hub))
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert found == {*FILES, "chat_template.jinja"} - {"pytorch_model.bin"}

    @pytest.mark.parametrize(
        ("files", "said"),
        [
            (["b.gguf", "a.gguf", "README.md"], "holds GGUF files, of which one has to be named; add /a.gguf"),
            (["pytorch_model.bin", "README.md"], "holds no model; it has README.md, pytorch_model.bin"),
        ],
    )
    def test_what_is_no_model_folder(self, hub, files, said):
        hub.files["org/name"] = dict.fromkeys(files, b"x")
        assert on_hub("fetch('hf://org/name')", hub) == f"InputError hf://org/name {said}"

    def test_a_part_of_a_split_file_brings_the_others(self, hub):
        parts = {f"m-{number:05}-of-00003.gguf": bytes([number]) for number in (1, 2, 3)}
        hub.files["org/name"] |= parts
        path = Path(on_hub("fetch('hf://org/name/m-00002-of-00003.gguf')", hub))
        assert {name: path.with_name(name).read_bytes() for name in parts} == parts
        assert path.name == "m-00002-of-00003.gguf"
        del hub.files["org/name"]["m-00003-of-00003.gguf"]
        said = on_hub("fetch('hf://org/name/m-00001-of-00003.gguf')", hub)
        assert said.startswith("InputError hf://org/name/m-00001-of-00003.gguf: org/name has no file m-00003-of-00003")


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

    def test_a_part_of_a_split_file_brings_the_others(self, bucket, scheme):
        parts = {f"m-{number:05}-of-00002.gguf": bytes([number]) for number in (1, 2)}
        for name, content in parts.items():
            bucket.pipe(f"/bucket/model/{name}", content)
        uri = f"{scheme}://bucket/model/m-00001-of-00002.gguf"
        path = fetch(uri)
        assert {name: path.with_name(name).read_bytes() for name in parts} == parts
        before = identity(uri)
        bucket.pipe("/bucket/model/m-00002-of-00002.gguf", b"new")
        assert identity(uri) != before
        assert fetch(uri).with_name("m-00002-of-00002.gguf").read_bytes() == b"new"
        bucket.rm("/bucket/model/m-00002-of-00002.gguf")
        with pytest.raises(InputError, match=r"m-00002-of-00002\.gguf does not exist"):
            fetch(uri)

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
