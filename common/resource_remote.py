"""Resources of the Hugging Face hub and of object stores (see ``resources``)."""

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.resource_cache import (
    BAD_DOWNLOAD,
    NO_SPACE,
    PARTS,
    Progress,
    Resource,
    cache_folder,
    cache_key,
    check_sha256,
    copy_to_disk,
    file_entry,
    file_name,
    in_cache,
    parts_of,
    write_atomically,
)
from saex_pipe.common.resource_local import file_sha256

# Of a model's top folder: deeper ones hold other formats, and "consolidated" is the same weights once more.
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab*", "*.model"]
NOT_MODEL_FILES = ["*/*", "consolidated*.safetensors"]
STORE_EXTRAS = {"gs": "gcs", "s3": "s3"}  # scheme to the optional extra that brings its file system
STORE_DIGESTS = ("md5Hash", "ETag", "etag", "crc32c")  # what stores tell of an object's content, best first


@contextmanager
def _remote_errors(resource: Resource) -> Iterator[None]:
    """Turn whatever a client library raises into one line; errors of the local disk pass unchanged."""
    try:
        yield
    except SaexError:
        raise
    except Exception as error:  # each client library, and each one's transport, has errors of its own
        if isinstance(error, OSError) and (error.errno in NO_SPACE or in_cache(error.filename)):
            raise
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{resource.uri} does not exist", "check bucket and path") from error
        if isinstance(error, PermissionError):
            raise InputError(f"{resource.uri}: access denied", "log in with an account that may read it") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SaexError(
            f"{resource.uri} cannot be reached ({reason[:200]}); check the network and the credentials"
        ) from error


# ---- the Hugging Face hub


class _HubFile(NamedTuple):
    kind: str  # model or dataset
    repo: str
    revision: str
    file: str | None  # None for a whole model


def _hub_file(resource: Resource) -> _HubFile:
    match = re.fullmatch(r"(datasets/)?([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?", resource.rest, flags=re.ASCII)
    if not match:
        raise InputError(
            f"{resource.uri} is not of the form hf://[datasets/]ORG/NAME[@REVISION][/FILE]", "name ORG and NAME"
        )
    wanted = _HubFile("dataset" if match[1] else "model", match[2], match[3] or "main", match[4] or None)
    if wanted.file is None and (resource.sha256 or wanted.kind == "dataset"):
        raise InputError(f"{resource.uri} names no file", "a checksum and a data set each need one: add /FILE")
    return wanted


@contextmanager
def _hub_errors(resource: Resource, wanted: _HubFile) -> Iterator[None]:
    from huggingface_hub import errors

    with _remote_errors(resource):
        try:
            yield
        except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
            raise SaexError(
                f"{resource.uri} is not in the cache and the hub cannot be reached; go online (unset HF_HUB_OFFLINE) "
                "or give the path of a local copy"
            ) from error
        except errors.GatedRepoError as error:
            raise InputError(
                f"{resource.uri}: access to {wanted.repo} has to be granted",
                "ask for it on its page, then set HF_TOKEN",
            ) from error
        except errors.RevisionNotFoundError as error:
            raise InputError(
                f"{resource.uri}: {wanted.repo} has no revision {wanted.revision!r}", "name a branch, tag or commit"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise InputError(
                f"{resource.uri}: the hub shows no {wanted.kind} {wanted.repo}",
                "check the name, or set HF_TOKEN if it is private",
            ) from error


def _hub_commit(resource: Resource, wanted: _HubFile) -> str:
    """The commit that stands for the revision: asked of the hub once, then kept."""
    if re.fullmatch(r"[0-9a-f]{40}", wanted.revision):
        return wanted.revision
    name = f"{wanted.kind}:{wanted.repo}@{wanted.revision}"
    pin = cache_folder() / "hf-commits" / f"{hashlib.sha256(name.encode()).hexdigest()}.json"
    with suppress(FileNotFoundError, ValueError, KeyError):
        return str(json.loads(pin.read_text(encoding="utf-8"))["commit"])
    with _hub_errors(resource, wanted):
        from huggingface_hub import HfApi

        commit = str(HfApi().repo_info(wanted.repo, repo_type=wanted.kind, revision=wanted.revision).sha)
    write_atomically(pin, json.dumps({"revision": name, "commit": commit}))
    return commit


def hub_identity(resource: Resource) -> str:
    """The URI with the commit in place of the revision."""
    wanted = _hub_file(resource)
    prefix = "datasets/" if wanted.kind == "dataset" else ""
    return f"hf://{prefix}{wanted.repo}@{_hub_commit(resource, wanted)}/{wanted.file or ''}"


def fetch_hub(resource: Resource, progress: bool) -> Path:
    """A file of the hub, or the folder of a model's weights, configuration and tokenizer."""
    wanted = _hub_file(resource)
    commit = _hub_commit(resource, wanted)
    # Says that all of it has arrived and fits its checksum; holds the path relative to the cache folder.
    record = cache_folder() / "hf-complete" / f"{cache_key(resource, commit)}.json"
    with suppress(FileNotFoundError, ValueError, KeyError):
        path = cache_folder() / json.loads(record.read_text(encoding="utf-8"))["path"]
        if path.exists():
            return path
    path = _download_from_hub(resource, wanted, commit, progress)
    if resource.sha256 and (actual := file_sha256(path)) != resource.sha256:
        path.resolve().unlink()  # the content; the path itself is a link to it
        path.unlink(missing_ok=True)
        check_sha256(resource, actual, BAD_DOWNLOAD)
    relative = (path.parent.resolve() / path.name).relative_to(cache_folder().resolve())
    write_atomically(record, json.dumps({"uri": resource.uri, "path": str(relative)}))
    return cache_folder() / relative


def _download_from_hub(resource: Resource, wanted: _HubFile, commit: str, progress: bool) -> Path:
    with _hub_errors(resource, wanted):
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # one look for all downloads: Progress below
        place = cache_folder() / "hf"
        info = HfApi().repo_info(wanted.repo, repo_type=wanted.kind, revision=commit, files_metadata=True)
        sizes = {item.rfilename: item.size or 0 for item in getattr(info, "siblings", None) or []}
        chosen = _chosen(resource, wanted, list(sizes))
        blobs = place / f"{wanted.kind}s--{wanted.repo.replace('/', '--')}" / "blobs"

        def measure() -> int:
            return sum(file.stat().st_size for file in blobs.glob("*")) - there_before

        there_before = 0
        there_before = measure()
        with Progress(resource.uri, show=progress) as shown, shown.watching(measure):
            shown.total_bytes = sum(sizes[name] for name in chosen)
            patterns = [glob.escape(name) for name in chosen]
            folder = Path(
                snapshot_download(
                    wanted.repo, repo_type=wanted.kind, revision=commit, cache_dir=place, allow_patterns=patterns
                )
            )
        absent = [name for name in chosen if not (folder / name).is_file()]
        if absent:
            raise SaexError(f"{resource.uri}: the download ended without {absent[0]}; fetch it again")
        return folder / (wanted.file or "")


def _chosen(resource: Resource, wanted: _HubFile, names: list[str]) -> list[str]:
    """The files to fetch of those that the repository has."""
    if wanted.file is not None:
        parts = [_hub_file(part).file for part in parts_of(resource)]
        missing = next((part for part in parts if part not in names), None)
        if missing is not None:
            near = get_close_matches(missing, names) or sorted(names)[:5]
            raise InputError(
                f"{resource.uri}: {wanted.repo} has no file {missing}", f"it has {', '.join(near) or 'none'}"
            )
        return [part for part in parts if part is not None]
    chosen = [
        name
        for name in names
        if any(fnmatch(name, pattern) for pattern in MODEL_FILES)
        and not any(fnmatch(name, pattern) for pattern in NOT_MODEL_FILES)
    ]
    quantised = sorted(name for name in names if name.endswith(".gguf"))
    if quantised and "config.json" not in chosen:
        raise InputError(f"{resource.uri} holds GGUF files, of which one has to be named", f"add /{quantised[0]}")
    if not chosen:
        raise InputError(f"{resource.uri} holds no model", f"it has {', '.join(sorted(names)[:5]) or 'no files'}")
    return chosen


# ---- object stores


def _objects(resource: Resource) -> dict[str, dict[str, Any]]:
    """What the store says of each object: by name under the prefix, or of each part; "" for the object itself."""
    parts = parts_of(resource)
    if len(parts) > 1:
        return {file_name(part): _info(part) for part in parts}
    info, path = _info(resource), resource.rest.strip("/")
    if info["type"] == "file":
        return {"": info}
    with _remote_errors(resource):
        listed = _store(resource).find(path, detail=True)
    found = {name.removeprefix(path).strip("/"): info for name, info in listed.items()}
    if not found:
        raise InputError(f"{resource.uri} holds nothing", "check bucket and path")
    return found


def _info(resource: Resource) -> dict[str, Any]:
    store = _store(resource)
    with _remote_errors(resource):
        return dict(store.info(resource.rest.strip("/")))


def _store(resource: Resource) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(resource.scheme)
    except ImportError:
        extra = STORE_EXTRAS[resource.scheme]
        raise InputError(
            f"{resource.uri}: {resource.scheme}:// takes the optional extra '{extra}', which is not installed",
            f"pip install 'saex-pipe[{extra}]'",
        ) from None


def _version(resource: Resource, info: dict[str, Any]) -> str:
    known = next((str(info[name]) for name in STORE_DIGESTS if info.get(name)), None)
    return known or str(_store(resource).checksum(info["name"]))


def _version_of_all(resource: Resource, objects: dict[str, dict[str, Any]]) -> str:
    versions = {name: _version(resource, info) for name, info in objects.items()}
    return versions.get("") or hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()


def store_identity(resource: Resource) -> str:
    """The URI and the store's own checksum; of a prefix, a digest of names and checksums."""
    file_name(resource)
    return f"{resource.uri}@{_version_of_all(resource, _objects(resource))}"


def fetch_store(resource: Resource, progress: bool) -> Path:
    """A copy of an object, or a folder with a copy of each object under a prefix."""
    name = file_name(resource)
    # With a checksum the copy stands by that, and a copy in the cache is used without asking the store.
    listed = {} if resource.sha256 else _objects(resource)

    def make(temp: Path) -> Path:
        objects = listed or _objects(resource)
        if resource.sha256 and "" not in objects:
            raise InputError(f"{resource.uri} is a folder and has no sha256", "name a file or leave the checksum out")
        root = temp / (PARTS if len(parts_of(resource)) > 1 else name)
        with Progress(resource.uri, show=progress) as shown, _remote_errors(resource):
            shown.total_bytes = sum(info.get("size") or 0 for info in objects.values())
            for relative, info in objects.items():
                _copy_object(resource, info, root, relative, shown)
        return root

    return file_entry(resource, _version_of_all(resource, listed), make, progress=progress)


def _copy_object(resource: Resource, info: dict[str, Any], root: Path, relative: str, shown: Progress) -> None:
    if ".." in Path(relative).parts:
        raise InputError(f"{resource.uri} holds an object named {relative!r}", "rename it")
    target = root / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    before_bytes = shown.done_bytes
    with _store(resource).open(info["name"], "rb") as stream:
        digest = copy_to_disk(stream, target, lambda copied: shown.update(before_bytes + copied))
    check_sha256(resource, digest, BAD_DOWNLOAD)
