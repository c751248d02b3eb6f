"""The output folder of a stage while it runs: up to date, to be continued, fresh, or to be replaced.

The digest covers the stage, its schema version, the settings that change the result, the digests of the
upstream outputs and the identities of outside files. A folder with the same digest is continued or, when it
has a manifest, left alone; one with another digest is refused, naming the fields, unless ``force`` is given:
then the new output grows in ``.NAME.saex-new`` beside it and replaces the old one when it is complete.
"""

import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from saex_pipe.common.config import StageConfig, canonical_digest
from saex_pipe.common.errors import InputError, SaexError, Superseded
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import (
    MANIFEST,
    STARTED,
    Manifest,
    commit_shard,
    fingerprint,
    found_fingerprint,
)
from saex_pipe.common.metrics_log import MetricsLog

METRICS = "metrics.jsonl"
_WORK = ("ledger/", "parts/", "state/", "claims/", "workers/")  # what the next run of the same stage goes on from
_PREPARED = (STARTED, METRICS, "store.json", "calibration.json")  # nothing is lost with these
_TOOLS = ("saex-pipe", "jax", "jaxlib", "flax", "optax", "tensorstore", "zarr", "transformers", "gguf", "apache-beam")


class StageOutput:
    """One stage's output folder while the stage runs."""

    def __init__(self, config: StageConfig, folder: Folder, target: Folder, fields: dict[str, Any]) -> None:
        self.config = config
        self.folder = folder  # where this run writes
        self.target = target  # where the output will be found
        self.fields = fields
        self.manifest: Manifest | None = None  # set when the output is finished
        name = METRICS if config.worker_name is None else f"metrics-{config.worker_name}.jsonl"
        local = folder.local_path()
        file = None if local is None else local / name
        self.metrics = MetricsLog(file, lambda data: folder.write(name, data), lambda: folder.read(name))
        self.resumed = folder.read(STARTED) is not None
        self._start = time.monotonic()

    @property
    def digest(self) -> str:
        """The digest of this output."""
        return canonical_digest(self.fields)

    def finished_shards(self) -> set[int]:
        """Numbers of the shards finished so far, by the names of their entries alone."""
        return {_shard_number(name) for name in self.folder.list("ledger/")}

    def ledger(self) -> dict[int, dict[str, Any]]:
        """The entries of the shards finished so far, by shard number."""
        found = self.folder.read_many(self.folder.list("ledger/"))
        return {_shard_number(name): self._parsed_entry(name, data) for name, data in found.items()}

    def _parsed_entry(self, name: str, data: bytes) -> dict[str, Any]:
        try:
            return dict(json.loads(data))
        except (ValueError, TypeError):
            raise SaexError(
                f"{self.folder.uri}/{name} is damaged; delete this one file and run the same command again, "
                "which makes up for it"
            ) from None

    def commit_shard(self, shard: int, entry: dict[str, Any]) -> None:
        """Record shard ``shard`` as finished; its data must be durable before this call."""
        commit_shard(self.folder, shard, entry)

    def finish(
        self, *, contents: dict[str, Any], totals: dict[str, Any], timings: Mapping[str, float] | None = None
    ) -> Manifest:
        """Write the manifest, which makes the output finished; the stage may have ``timings`` of its own."""
        self.metrics.close()
        manifest = Manifest(
            stage=self.config.stage,
            schema_version=self.config.schema_version,
            digest=self.digest,
            fingerprint=self.fields,
            config=self.config.model_dump(mode="json"),
            versions=_versions(),
            contents=contents,
            totals=totals,
            timings={"seconds": round(time.monotonic() - self._start, 3), "resumed": float(self.resumed)}
            | dict(timings or {}),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.folder.write(MANIFEST, json.dumps(manifest.__dict__, indent=1, sort_keys=True).encode())
        self.manifest = manifest
        return manifest


def _shard_number(name: str) -> int:
    return int(name.removeprefix("ledger/").removesuffix(".json"))


@contextmanager
def stage_output(config: StageConfig, *, force: bool = False) -> Iterator[StageOutput]:
    """Open ``config.out`` for this configuration: up to date, to be continued, or fresh.

    Raises an InputError naming the differing fields when the folder belongs to another configuration and
    ``force`` is not given.
    """
    fields = fingerprint(config)
    digest = canonical_digest(fields)
    target, staging = Folder(config.out), _staging(config)
    _settle_replacement(staging, target, digest)
    found = _found(target)
    output = StageOutput(config, target, target, fields)
    if found is not None and canonical_digest(found) != digest:
        if not force:
            raise _differs(config, target, found, fields)
        output = StageOutput(config, staging, target, fields)
        waiting = found_fingerprint(staging)
        if waiting is not None and canonical_digest(waiting) != digest:
            staging.delete()
    else:
        output.manifest = Manifest.read(target)
    if output.manifest is None:
        output.folder.write(STARTED, json.dumps(fields, sort_keys=True).encode())
    try:
        yield output
    except BaseException as error:
        with suppress(OSError, SaexError):  # such as a disk that is full: what it was raised for says more
            output.metrics.close()
        if _is_worthless(output, error):
            _discard(output.folder)
        raise
    output.metrics.close()
    if output.folder is staging and output.manifest is not None:
        _replace(staging, target)
        output.folder = target


def finished_output(config: StageConfig) -> Manifest | None:
    """The manifest of ``config.out`` where it holds the result of this very configuration."""
    digest = canonical_digest(fingerprint(config))
    target = Folder(config.out)
    _settle_replacement(_staging(config), target, digest)
    manifest = Manifest.read(target)
    return manifest if manifest is not None and manifest.digest == digest else None


def _found(target: Folder) -> dict[str, Any] | None:
    """The fingerprint of what ``target`` holds or is receiving, None for an empty one.

    Every worker writes its fingerprint before anything else: of files seen without one it must be looked for again, as
    a worker may have come in between.
    """
    found = found_fingerprint(target)
    if found is None and target.list():
        found = found_fingerprint(target)
        if found is None:
            raise InputError(
                f"{target.uri} holds files that are not a stage's output", "choose another --out or empty it"
            )
    return found


def _staging(config: StageConfig) -> Folder:
    return beside(Folder(config.out), "saex-new")


def beside(folder: Folder, role: str) -> Folder:
    """A folder of a name that nobody else gives, in the parent of ``folder``."""
    local = folder.local_path()
    if local is not None:
        return Folder(str(local.with_name(f".{local.name}.{role}")))
    parent, _, name = folder.uri.rpartition("/")
    return Folder(f"{parent}/.{name}.{role}")


def _is_worthless(output: StageOutput, error: BaseException) -> bool:
    """Whether a failed run left nothing to continue: bad input must not be in the way of good input later."""
    if output.config.worker_name is not None or isinstance(error, Superseded):
        return False  # others may be at work in the folder
    try:
        names = output.folder.list()
    except SaexError:
        return False
    if isinstance(error, InputError) and not output.resumed:
        return not any(name.startswith(_WORK) for name in names)
    # Of a folder that was there before, another process may be what has prepared it.
    return not output.resumed and all(name in _PREPARED or name.rpartition("/")[2] == "zarr.json" for name in names)


def _discard(folder: Folder) -> None:
    folder.delete()
    local = folder.local_path()
    if local is not None:
        shutil.rmtree(local, ignore_errors=True)


def _differs(config: StageConfig, target: Folder, found: dict[str, Any], fields: dict[str, Any]) -> InputError:
    names = [name for name in sorted({*found, *fields}) if found.get(name) != fields.get(name)]
    shown = ", ".join(f"{name} ({_brief(found.get(name))} there, {_brief(fields.get(name))} now)" for name in names)
    return InputError(
        f"{target.uri} holds the output of another configuration of {config.stage}: {shown}",
        "--force replaces it, another --out keeps both",
    )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}...{text[-1]}"


def _settle_replacement(staging: Folder, target: Folder, digest: str) -> None:
    """Finish a replacement by the output ``digest`` that was interrupted after that was complete; undo any other."""
    manifest = Manifest.read(staging)
    if manifest is not None and manifest.digest == digest:
        _replace(staging, target)
    local, grave = target.local_path(), _grave(target)
    if local is not None and grave is not None and grave.exists():
        if not local.exists():
            grave.rename(local)
        elif Manifest.read(target) is not None:
            shutil.rmtree(grave)


def _grave(target: Folder) -> Path | None:
    """Where the old output lies while the new one takes its place on a local disk."""
    return beside(target, "saex-old").local_path()


def _replace(staging: Folder, target: Folder) -> None:
    """Put the finished ``staging`` in the place of ``target``. Interrupted anywhere, it can be run again:
    the staging manifest goes last, and without a target manifest nobody takes the target for finished.
    """
    old, new, grave = target.local_path(), staging.local_path(), _grave(target)
    if old is not None and new is not None and grave is not None:
        if old.exists():
            shutil.rmtree(grave, ignore_errors=True)
            old.rename(grave)
        new.rename(old)
        shutil.rmtree(grave, ignore_errors=True)
        return
    target.delete(MANIFEST)
    names = staging.list()
    for stale in set(target.list()) - set(names):
        target.delete(stale)
    for name in sorted(names, key=lambda name: name == MANIFEST):
        data = staging.read(name)
        if data is not None:
            target.write(name, data)
    staging.delete()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for tool in _TOOLS:
        try:
            versions[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    return versions
