"""Resources that are on this machine already: paths and the data of installed packages (see ``resources``)."""

import contextlib
import difflib
import hashlib
import importlib.resources
import json
import os
import time
from importlib.resources.abc import Traversable
from pathlib import Path

from saex_pipe.common.errors import InputError
from saex_pipe.common.resource_cache import (
    PARTS,
    Progress,
    Resource,
    cache_folder,
    check_sha256,
    copy_to_disk,
    file_entry,
    file_name,
    parts_of,
    write_atomically,
)

# A file changed this recently may change again within the same time stamp: its digest is not remembered.
SETTLED_SECONDS = 2.0


def _existing_path(resource: Resource) -> Path:
    path = Path(resource.rest).expanduser().absolute()
    if not path.exists():
        near = difflib.get_close_matches(path.name, os.listdir(path.parent) if path.parent.is_dir() else [])
        raise InputError(f"{path} does not exist", f"did you mean {' or '.join(near)}?" if near else "check the path")
    return path


def fetch_path(resource: Resource, progress: bool) -> Path:
    """The path itself, absolute, once it is seen to be readable and to fit its checksum."""
    path = _existing_path(resource)
    if path.is_dir():
        if resource.sha256:
            raise InputError(f"{path} is a folder and has no sha256", "name a file or leave the checksum out")
        os.listdir(path)  # raises where it cannot be read
        return path
    for part in parts_of(resource):
        with open(_existing_path(part), "rb"):  # raises where it cannot be read
            pass
    if resource.sha256:
        check_sha256(resource, file_sha256(path), "correct the checksum or replace the file")
    return path


def path_identity(resource: Resource) -> str:
    """Digest of a file's content; of a folder's, over the names and contents of its files, hidden ones left out.

    Of a part of a split file, over the names and contents of all parts.
    """
    path = _existing_path(resource)
    if not path.is_dir():
        return _files_identity([_existing_path(part) for part in parts_of(resource)])
    files = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
    visible = sorted(name for name in files if not any(part.startswith(".") for part in name.parts))
    return f"folder-sha256:{_listing_sha256({name.as_posix(): files[name] for name in visible})}"


def _files_identity(paths: list[Path]) -> str:
    if len(paths) == 1:
        return f"sha256:{file_sha256(paths[0])}"
    return f"parts-sha256:{_listing_sha256({path.name: path for path in paths})}"


def _listing_sha256(files: dict[str, Path]) -> str:
    listing = [[name, file_sha256(path)] for name, path in files.items()]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file, remembered in the cache folder by absolute path, size and modification time."""
    path = path.absolute()
    status = path.stat()
    stamp = [str(path), status.st_size, status.st_mtime_ns]
    memo = cache_folder() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent or damaged: computed again
        known = json.loads(memo.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["sha256"])
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - status.st_mtime > SETTLED_SECONDS:
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time here
            write_atomically(memo, json.dumps({"stamp": stamp, "sha256": digest}))
    return digest


def _package_file(resource: Resource) -> Traversable:
    package, _, name = resource.rest.partition("/")
    file_name(resource)
    try:
        folder = importlib.resources.files(package)
    except (ImportError, ValueError, TypeError):
        raise InputError(
            f"{resource.uri}: there is no installed package {package!r}", "write package://PACKAGE/FILE"
        ) from None
    file = folder.joinpath(name)
    if not file.is_file():
        present = ", ".join(sorted(item.name for item in folder.iterdir() if item.is_file())) or "nothing"
        raise InputError(f"{resource.uri}: {package} holds no file {name!r}", f"it holds {present}")
    return file


def fetch_package(resource: Resource, progress: bool) -> Path:
    """The file where the package is installed; unpacked into the cache where the package is a zip archive."""
    parts = parts_of(resource)
    source, *others = [_package_file(part) for part in parts]
    if isinstance(source, Path):
        check_sha256(resource, file_sha256(source) if resource.sha256 else "", "correct the checksum")
        return source.with_name(file_name(resource))

    def make(temp: Path) -> Path:
        folder = temp / PARTS
        folder.mkdir()
        for file in (source, *others):
            with file.open("rb") as stream, Progress(resource.uri, show=progress) as shown:
                check_sha256(resource, copy_to_disk(stream, folder / file.name, shown.update), "correct the checksum")
        return folder if others else folder / source.name

    return file_entry(resource, package_identity(resource), make, progress=progress)


def package_identity(resource: Resource) -> str:
    """Digest of the file's content."""
    sources = [_package_file(part) for part in parts_of(resource)]
    paths = [source for source in sources if isinstance(source, Path)]
    if paths:
        return _files_identity(paths)
    contents = [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources]
    return f"sha256:{contents[0] if len(contents) == 1 else hashlib.sha256(json.dumps(contents).encode()).hexdigest()}"
