"""What is in a stage's folder, and whether it is finished.

``started.json``   written first: the configuration whose output this folder is receiving
``ledger/N.json``  one entry a finished shard, written after the shard itself
``manifest.json``  written last: its presence means done
"""

import json
from dataclasses import dataclass
from typing import Any

from saex_pipe.common import resources
from saex_pipe.common.config import Resource, StageConfig, Upstream, canonical_digest
from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.folder import Folder

MANIFEST = "manifest.json"
STARTED = "started.json"


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``."""

    stage: str
    schema_version: int
    digest: str
    fingerprint: dict[str, Any]  # what the digest is taken of, by field
    config: dict[str, Any]
    versions: dict[str, str]
    contents: dict[str, Any]  # geometry and statistics, by stage
    totals: dict[str, Any]  # counts with their unit in the name
    timings: dict[
        str, float
    ]  # of the process that finished, in seconds or as shares; resumed: 1 where others had begun
    finished_at: str

    @staticmethod
    def read(folder: Folder) -> "Manifest | None":
        """The manifest of ``folder``, None while it is not finished."""
        data = folder.read(MANIFEST)
        if data is None:
            return None
        try:
            found = json.loads(data)
            return Manifest(**{name: found[name] for name in Manifest.__dataclass_fields__})
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{folder.uri}/{MANIFEST} is not a manifest of this version of saex-pipe",
                "delete the folder and run its stage again",
            ) from None

    @staticmethod
    def require(uri: str, stages: tuple[str, ...], schema_version: int = 1) -> "Manifest":
        """The manifest at ``uri``, written by one of ``stages`` with ``schema_version``; else an InputError."""
        manifest = Manifest.read(Folder(uri))
        if manifest is None:
            raise InputError(
                f"{uri} holds no finished output of {' or '.join(stages)}",
                f"run 'saex-pipe {stages[0]}' first or point to a folder with a {MANIFEST}",
            )
        if manifest.stage not in stages:
            raise InputError(f"{uri} was written by {manifest.stage}", f"give the output of {' or '.join(stages)}")
        if manifest.schema_version == 1 and schema_version == 2:  # an activation store: the only one that has changed
            raise InputError(
                f"{uri} has schema version 1, this version of saex-pipe reads 2",
                f"'saex-pipe store migrate {uri}' brings it to this one",
            )
        if manifest.schema_version != schema_version:
            raise InputError(
                f"{uri} has schema version {manifest.schema_version}, this version of saex-pipe reads {schema_version}",
                f"run 'saex-pipe {manifest.stage}' again with --force, or install the version that wrote it "
                f"(saex-pipe {manifest.versions.get('saex-pipe', 'unknown')})",
            )
        return manifest


def fingerprint(config: StageConfig) -> dict[str, Any]:
    """Everything the result depends on: settings, upstream digests, identities of outside files."""
    fields: dict[str, Any] = {"stage": config.stage, "schema_version": config.schema_version}
    fields |= config.result_fields()
    for name in config.marked(Upstream):
        value = getattr(config, name)
        if value is None or isinstance(value, str):
            fields[name] = value and _upstream_digest(config, name, value)
        else:
            fields[name] = [_upstream_digest(config, name, uri) for uri in value]
    for name in config.marked(Resource):
        value = getattr(config, name)
        if value is None or isinstance(value, str):
            fields[name] = value and resources.identity(value)
        else:
            fields[name] = [resources.identity(uri) for uri in value]
    return fields


def _upstream_digest(config: StageConfig, name: str, uri: str) -> str:
    folder = Folder(uri)
    upstream = Manifest.read(folder)
    if upstream is not None:
        return upstream.digest
    started = found_fingerprint(folder) if config.takes_unfinished else None
    if started is not None:
        return canonical_digest(started)  # which the manifest will have, too
    raise InputError(
        f"{config.stage}.{name} = {uri!r} holds no finished output",
        "run the stage that writes it first, or point to a folder with a manifest.json",
    )


def found_fingerprint(folder: Folder) -> dict[str, Any] | None:
    """The fingerprint of what ``folder`` holds or is receiving, None for an empty one."""
    manifest = Manifest.read(folder)
    if manifest is not None:
        return manifest.fingerprint
    started = folder.read(STARTED)
    try:
        return None if started is None else dict(json.loads(started))
    except (ValueError, TypeError):
        raise InputError(
            f"{folder.uri}/{STARTED} is not of this version of saex-pipe", "delete the folder and run its stage again"
        ) from None


def commit_shard(folder: Folder, shard: int, entry: dict[str, Any]) -> None:
    """Write the ledger entry of shard ``shard``, for workers that have only the folder."""
    folder.write(f"ledger/{shard:06d}.json", json.dumps(entry, sort_keys=True).encode())
