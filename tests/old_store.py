"""Activation stores as schema version 1 left them."""

import json
import zlib
from pathlib import Path

from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.statistics import floats_from_text


def make_old(path: Path) -> Path:
    """Turn the store at ``path`` (of one dtype) into one of version 1, whose objects were laid out alike."""
    store = ActivationStore(str(path))
    for number, windows in enumerate(store.info.tiling.shards(store.info.windows)):
        ledger = path / f"ledger/{number:06d}.json"
        entry = json.loads(ledger.read_text())
        for name in ("outliers", "tap_outliers", "checksums", "added_error"):
            del entry[name]
        entry["crc32"] = {tap: zlib.crc32(store.acts(tap, windows).tobytes()) for tap in store.info.taps}
        entry["statistics"] = {tap: _in_digits(found) for tap, found in entry["statistics"].items()}
        ledger.write_text(json.dumps(entry))
    manifest = json.loads((path / "manifest.json").read_text())
    contents = manifest["contents"]
    contents["dtype"] = next(iter(contents.pop("dtypes").values()))
    contents["rows_per_chunk"] = store.rows_per_chunk().tolist()
    contents["statistics"] = {tap: _in_digits(found) for tap, found in contents["statistics"].items()}
    for name in ("channels", "outlier_share", "tap_outlier_share", "added_error", "index"):
        del contents[name]
    manifest |= {"schema_version": 1, "digest": "old", "contents": contents}
    manifest["fingerprint"] |= {"schema_version": 1}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "started.json").write_text(json.dumps(manifest["fingerprint"]))
    for made in ("store.json", "index/rows.npy", *(f"index/crc32c/{array}.npy" for array in store.layouts)):
        (path / made).unlink()
    return path


def _in_digits(statistics):
    return statistics | {name: floats_from_text(statistics[name]).tolist() for name in ("sum", "sum_square")}
