"""Activation store against raw files: sequential write and shuffled read, in MB/s (10^6 bytes).

    python infra/bench/store.py [--quick] [--folder DIR]

One JSON object a line. The bounds are measured in the same run, on the same disk, with the same bytes: for writing, raw
files of one shard each with fsync; for reading, one copy of a warm raw file into a preallocated buffer.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from saex_pipe.common.formats.activations import (
    SCHEMA_VERSION,
    ActivationStore,
    ActivationWriter,
    StoreInfo,
    finish_contents,
)
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.row_reader import RowReader
from saex_pipe.common.formats.zarr_array import Tiling

WIDTH, LENGTH, BATCH_ROWS = 2048, 128, 4096


def median_seconds(action: Callable[[], object], runs: int) -> float:
    """Median wall time of ``runs`` calls."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def report(case: str, size: int, seconds: float, bound_seconds: float) -> None:
    value, bound = size / 1e6 / seconds, size / 1e6 / bound_seconds
    figures = {
        "value": round(value, 1),
        "unit": "MB/s",
        "bound": round(bound, 1),
        "bound_fraction": round(value / bound, 3),
    }
    print(json.dumps({"bench": "store", "case": case, **figures}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 MB instead of 1 GB, 3 runs instead of 5")
    parser.add_argument("--folder", type=Path, help="disk to measure (default: a temporary folder)")
    arguments = parser.parse_args()
    runs, shards = (3, 4) if arguments.quick else (5, 16)
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        measure(root, runs, shards)
    finally:
        shutil.rmtree(root)


def measure(root: Path, runs: int, shards: int) -> None:
    tiling = Tiling.for_bytes(LENGTH * WIDTH * 2, shards * 128)
    windows = shards * tiling.shard_windows
    info = StoreInfo(windows, windows, LENGTH, {"tap": WIDTH}, {"tap": "bfloat16"}, tiling, RowPolicy(), {})
    random = np.random.default_rng(0)
    shape = (tiling.shard_windows, LENGTH)
    acts_NLD = random.standard_normal((*shape, WIDTH), np.float32).astype(ml_dtypes.bfloat16)
    tokens_NL, keep_NL = np.zeros(shape, np.int32), np.ones(shape, bool)
    size = acts_NLD.nbytes * shards

    def write_store() -> None:
        shutil.rmtree(root / "store", ignore_errors=True)
        writer = ActivationWriter(Folder(str(root / "store")), info)
        ledger = {
            i: writer.write_shard(part, tokens_NL, keep_NL, {"tap": acts_NLD})
            for i, part in enumerate(info.tiling.shards(windows))
        }
        folder = Folder(str(root / "store"))
        contents = finish_contents(folder, info, ledger)
        manifest = Manifest("harvest", SCHEMA_VERSION, "", {}, {}, {}, contents, {}, {}, "")
        folder.write("manifest.json", json.dumps(manifest.__dict__).encode())

    def write_raw() -> None:
        for shard in range(shards):
            with open(root / f"raw-{shard}", "wb") as file:
                file.write(acts_NLD.view(np.uint8).data)
                file.flush()
                os.fsync(file.fileno())

    report(
        "write with checksums and statistics", size, median_seconds(write_store, runs), median_seconds(write_raw, runs)
    )

    store = ActivationStore(str(root / "store"), ("tap",))
    steps = store.rows // BATCH_ROWS
    buffer = np.empty(acts_NLD.nbytes, np.uint8)

    def read_shuffled() -> None:
        with RowReader(store, ("tap",), seed=0, batch_rows=BATCH_ROWS, pool_bytes=1 << 28) as reader:
            for step in range(steps):
                reader.batch(step)

    def read_raw() -> None:
        for shard in range(shards):
            with open(root / f"raw-{shard}", "rb", buffering=0) as file:
                file.readinto(buffer)

    read = steps * BATCH_ROWS * WIDTH * 2
    report(
        "shuffled read, warm", read, median_seconds(read_shuffled, runs), median_seconds(read_raw, runs) * read / size
    )


if __name__ == "__main__":
    main()
