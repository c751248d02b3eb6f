"""What ``saex-pipe store`` prints and does: facts about an activation store, its checks, copies and repairs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from saex_pipe.common import resources
from saex_pipe.common.config import canonical_digest
from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.activations import SCHEMA_VERSION, WRITERS, ActivationStore, StoreInfo
from saex_pipe.common.formats.claims import claim_name
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.int8 import warn_of_added_error
from saex_pipe.common.formats.local_disk import can_write, stale_lock_bytes
from saex_pipe.common.formats.manifest import MANIFEST, Manifest, fingerprint, found_fingerprint
from saex_pipe.common.formats.stage_output import beside
from saex_pipe.common.formats.store_checks import Trouble, check_frame, check_shards
from saex_pipe.common.formats.store_debris import delete_debris, find_debris
from saex_pipe.common.formats.store_info import STORE
from saex_pipe.common.formats.store_migration import Migration
from saex_pipe.common.llm.tokenizer import load_tokenizer
from saex_pipe.common.metrics_log import progress
from saex_pipe.pipelines.chain import Recipe, config_class, finish_stage, with_assignments
from saex_pipe.pipelines.store_report import report
from saex_pipe.stages.copy.config import Config as CopyConfig
from saex_pipe.stages.copy.run import run as run_copy

_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
_BLOCKS = " ▁▂▃▄▅▆▇█"
_DEAD_ABOVE = 1.0  # ratio of the norm of the mean to the spread


def print_info(uri: str, price: float, as_json: bool) -> None:
    """Geometry, bytes and cost per month of a store, finished or not."""
    folder = Folder(uri)
    manifest, info = _opened(folder)
    shards = len(info.tiling.shards(info.windows))
    facts: dict[str, Any] = {
        "uri": uri,
        "state": "finished" if manifest is not None else f"{len(folder.list('ledger/'))} of {shards} shards",
        "taps": {tap: f"{width} x {info.dtypes[tap]}" for tap, width in info.taps.items()},
        "windows": info.windows,
        "tokens": info.windows * info.window_length,
        "shards": shards,
        "shard_bytes": info.shard_bytes,
        "chunk_windows": info.tiling.chunk_windows,
        "bytes": info.activation_bytes,
        "bytes_per_token": sum(map(info.row_bytes, info.taps)),
        "cost_per_month": round(info.activation_bytes / 1e9 * price, 2),
        "price_per_gb_month": price,
        "source": info.source.get("model", "toy"),
        "schema_version": SCHEMA_VERSION,
    }
    if manifest is not None:
        contents = manifest.contents
        facts |= {"rows": contents["rows"], "outlier_share": contents["outlier_share"], "digest": manifest.digest}
        facts |= {"finished_at": manifest.finished_at, "written_by": manifest.stage}
        facts |= {f"added_error {tap}": error for tap, error in contents["added_error"].items()}
    else:
        facts["claims"] = _claims(folder)
    _print_facts(facts, as_json)
    if manifest is not None:
        warn_of_added_error(uri, manifest.contents["added_error"])


def _opened(folder: Folder) -> tuple[Manifest | None, StoreInfo]:
    """The manifest of a store, None where it is not finished, and what the store is made of."""
    if Manifest.read(folder) is not None:
        manifest = Manifest.require(folder.uri, WRITERS, SCHEMA_VERSION)
        return manifest, StoreInfo.from_json(manifest.contents)
    started = folder.read(STORE)
    if started is None:
        raise InputError(f"{folder.uri} holds no activation store", "give the folder that a harvest or toy writes to")
    return None, StoreInfo.from_json(json.loads(started))


def _claims(folder: Folder) -> dict[str, str]:
    """Shards that workers hold at present, and who."""
    found = folder.read_many(folder.list("claims/"))
    states = {name: json.loads(data) for name, data in found.items()}
    return {name[len("claims/") : -len(".json")]: s["worker"] for name, s in states.items() if s.get("worker")}


def _print_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    table = Table("", "", show_header=False)
    for name, value in facts.items():
        shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(name.replace("_", " "), f"{shown:,}" if isinstance(shown, int) else str(shown))
    Console(soft_wrap=False).print(table)


def verify(uri: str, jobs: int, as_json: bool) -> None:
    """Read every object and print what is wrong, one line each; a SaexError where anything is."""
    store = ActivationStore(uri)
    found = list(find_trouble(store, jobs))
    for trouble in found:
        print(json.dumps(trouble._asdict()) if as_json else _line(trouble), flush=True)
    if found:
        raise SaexError(f"{uri}: {len(found)} findings; 'saex-pipe store repair {uri}' mends them")
    if not as_json:
        print(f"{uri}: all {len(store.info.tiling.shards(store.info.windows)):,} shards are as they were written")


def find_trouble(store: ActivationStore, jobs: int) -> Iterator[Trouble]:
    """Everything that is wrong with ``store``, with a bar."""
    frame = check_frame(store)
    yield from frame
    if any(trouble.array.startswith("index/") for trouble in frame):
        return  # there is nothing to check the shards against before that is mended
    objects = len(store.info.tiling.shards(store.info.windows)) * len(store.layouts)
    with progress("verifying", objects, "objects") as bar:
        for part in check_shards(store, jobs):
            bar.advance(1)
            yield from part


def _line(trouble: Trouble) -> str:
    where = trouble.array if trouble.shard is None else f"{trouble.array} shard {trouble.shard}"
    return f"{where}: {trouble.text}"


def print_stats(uri: str, as_json: bool, plot: str | None) -> None:
    """Statistics of every tap, with a small histogram of the norms of its rows; also as a page at ``plot``."""
    store = ActivationStore(uri)
    if plot is not None:
        Path(plot).write_text(report(store), encoding="utf-8")
    for tap, width in store.info.taps.items():
        found = store.statistics(tap)
        order = np.argsort(found.sum_square_D)[::-1][:5]
        share = found.sum_square_D[order] / max(found.sum_square_D.sum(), np.finfo(float).tiny)
        largest = {f"channel {channel}": round(float(part), 4) for channel, part in zip(order, share, strict=True)}
        facts: dict[str, Any] = {
            "tap": tap,
            "width": width,
            "rows": found.count,
            "root_mean_square_norm": round(float(np.sqrt(found.mean_square_norm)), 4),
            **{f"norm_{100 * q:g}_percent": round(found.norm_quantile(q), 4) for q in _QUANTILES},
            "outlier_share": store.manifest.contents.get("tap_outlier_share", {}).get(tap),
            "outlier_share_of_all_taps": store.manifest.contents["outlier_share"],
            "mean_to_spread": round(found.mean_to_spread, 4),
            "largest_shares_of_second_moment": largest,
        }
        if not as_json:
            facts["norms_upper_octaves"] = _sparkline(found.norms()[1][-40:])
            if found.mean_to_spread > _DEAD_ABOVE:
                facts["note"] = "far off zero: many latents will die unless the decoder bias starts at the mean"
        _print_facts(facts, as_json)


def _sparkline(counts: Sequence[int] | np.ndarray) -> str:
    top = max(1, int(np.max(counts, initial=0)))
    return "".join(_BLOCKS[-(-8 * int(count) // top)] for count in counts)


def print_sample(uri: str, rows: int, seed: int, tap: str | None) -> None:
    """Some random rows: where they are, the token in its context, the norm, and the first values."""
    store = ActivationStore(uri)
    tap = tap or next(iter(store.info.taps))
    store.require_tap(tap)
    tokenizer_uri = store.info.source.get("tokenizer", {}).get("uri")
    tokenizer = load_tokenizer(resources.fetch(tokenizer_uri)) if tokenizer_uri else None
    random = np.random.default_rng(seed)
    for window in sorted(random.integers(0, store.info.windows, rows)):
        one = range(window, window + 1)
        places = np.flatnonzero(store.keep(one)[0])
        if not len(places):
            continue
        place = int(random.choice(places))
        tokens_L, row_D = store.tokens(one)[0], store.acts(tap, one)[0, place].astype(np.float32)
        before, here = tokens_L[max(0, place - 8) : place], tokens_L[place : place + 1]
        text = f"{before.tolist()} [{here[0]}]"
        if tokenizer is not None:
            text = f"{tokenizer.decode(before)}[{tokenizer.decode(here)}]".replace("\n", " ")
        values = " ".join(f"{value:.3g}" for value in row_D[:4])
        print(f"window {window} position {place}: {text}  norm {np.linalg.norm(row_D):.4g}  {values} ...")


def copy(uri: str, out: str, assignments: Sequence[str], force: bool) -> None:
    """Copy a store, with the settings of the copy stage that ``assignments`` give."""
    settings = with_assignments(Recipe("copy", "", (), {}, ""), assignments, "copy").settings.get("copy", {})
    config = CopyConfig.create({"store": uri, "out": out, **settings})
    manifest = run_copy(config, force=force)
    errors = ", ".join(f"{tap} {error:.2g}" for tap, error in manifest.contents["added_error"].items())
    print(f"{config.out}: {manifest.totals['bytes']:,} bytes" + (f"; added error: {errors}" if errors else ""))


def repair(uri: str, jobs: int) -> None:
    """Make the shards again that are not as they were written, in this process, however many had made the store.

    The ledger entries go first and the manifest last: stopped in between, the store is either still finished and as
    bad as before, or one that its stage continues.
    """
    store, folder = ActivationStore(uri), Folder(uri)
    config = config_class(store.manifest.stage).create(store.manifest.config | {"out": uri}).alone()
    if canonical_digest(fingerprint(config)) != store.manifest.digest:
        raise InputError(f"{uri} was made of other inputs than there are now", f"run '{store.manifest.stage} --force'")
    found = list(find_trouble(store, jobs))
    if not found:
        print(f"{uri}: nothing to repair")
        return
    for trouble in found:
        print(_line(trouble), flush=True)
        if trouble.array in store.layouts and trouble.shard is None:
            folder.delete(f"{trouble.array}/zarr.json")  # written again with the array
    shards = sorted({trouble.shard for trouble in found if trouble.shard is not None})
    for shard in shards:
        folder.delete(f"ledger/{shard:06d}.json")
        folder.delete(claim_name(shard))
    folder.delete(MANIFEST)
    finish_stage(config, force=False)
    print(f"{uri}: made {len(shards)} shards again; 'saex-pipe store verify {uri}' checks all once more")


def migrate(uri: str, jobs: int) -> None:
    """Bring a store of an earlier schema version to the present one, where it stands."""
    migration = Migration.of(uri)
    config = config_class(migration.manifest.stage).create(migration.manifest.config | {"out": uri})
    with progress("migrating", len(migration.shards), "shards") as bar:
        for _ in migration.bring_shards(jobs):
            bar.advance(1)
    manifest = migration.finish(config)
    print(f"{uri}: all {len(migration.shards):,} shards are as they were written; its digest is now {manifest.digest}")


def prune(uri: str, yes: bool, stopped: bool) -> None:
    """Delete what no run goes on from and no reader needs, and say how much that is; only say so without ``yes``."""
    folder = Folder(uri)
    manifest, info = _opened(folder)
    old, new = beside(folder, "saex-old"), beside(folder, "saex-new")
    if manifest is None and Manifest.read(new) is not None:
        raise InputError(f"{uri} is being replaced by {new.uri}", "run its stage again, which completes that")
    started = found_fingerprint(folder) or {}
    claiming = started.get("stage") == "harvest"
    debris = find_debris(folder, info, finished=manifest is not None, stopped=stopped, claiming=claiming)
    places = (new,) if manifest is None else (old, new)
    replacement = [(place, name) for place in places for name in place.list()]
    waits = [name for place, name in replacement if place is new and not stopped]
    gone = [(f"{uri}/{piece.name}", piece.bytes) for piece in (delete_debris(folder, debris) if yes else debris.pieces)]
    for place, name in replacement:
        if stopped or place is old:
            gone.append((f"{place.uri}/{name}", len(place.read(name) or b"")))
            if yes:
                place.delete(name)
    gone += _stale_locks(folder, delete=yes)
    for where, _ in gone:
        print(f"{'deleted' if yes else 'would delete'} {where}")
    if debris.kept or waits:
        print(
            f"kept {len(debris.kept)} objects of {sum(piece.bytes for piece in debris.kept):,} bytes of unfinished "
            f"shards and {len(waits)} of a replacement, which a worker may be writing; --stopped says that none runs"
        )
    size = sum(size for _, size in gone)
    print(f"{len(gone)} objects of {size:,} bytes" + ("" if yes else "; nothing is deleted without --yes"))


def _stale_locks(folder: Folder, *, delete: bool) -> list[tuple[str, int]]:
    """Path and size of what writers that died left on a local disk; they are no objects, so not listed."""
    local = folder.local_path()
    if local is None or not can_write():
        return []
    found = [(str(path), stale_lock_bytes(path, delete=delete)) for path in sorted(local.rglob("*.__lock"))]
    return [(path, size) for path, size in found if size is not None]
