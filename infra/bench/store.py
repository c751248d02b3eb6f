"""The activation store against raw files: sequential write and shuffled read, in MB/s (10^6 bytes of activations).

    python infra/bench/store.py [--quick] [--folder DIR] [--peer-python PATH]

One JSON object a line; sides take turns, and all handle the same bytes on the same disk.

- ``write``: shards with their checksums and statistics, two at once as the harvest writes them; the bound is raw files
  of one shard each with fsync.
- ``shuffled read, warm``: batches in training order into arrays that are there; the bound is one copy of warm raw files
  into a buffer. Peers, where ``--peer-python`` names a Python that has them: SAELens' reader of cached activations
  and slices of safetensors shards, in rows of the same width (``peers_store.py``), as MB/s of bfloat16 rows.
- ``shuffled read, cold``: the same after the pages of the store are dropped; the bound is ``dd`` over raw
  files after the same. A disk that has a cache of its own, or a host's, is only measured by more bytes than that holds.
- ``open, seek and plan``: seconds and MB of memory for a store of a billion rows (``store_plan.py``); the bounds are
  the 1 s and 200 MB it may take.
- ``int8``: written from bfloat16 and read into float32; MB/s count bfloat16 bytes, so that they compare.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
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
from saex_pipe.common.formats.int8 import Channels
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.row_reader import RowReader
from saex_pipe.common.formats.zarr_array import Tiling
from saex_pipe.common.host_memory import keep_freed_memory

WIDTH, LENGTH, BATCH_ROWS = 2048, 128, 4096


def drop_pages(place: Path) -> None:
    """Have the kernel forget the contents of every file below ``place``."""
    for file in filter(Path.is_file, place.rglob("*")):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Bench:
    """One store of ``shards`` shards, and raw files of the same bytes."""

    def __init__(self, root: Path, shards: int, dtype: str) -> None:
        tiling = Tiling.for_bytes(LENGTH * WIDTH * 2, shards * 128)
        windows = shards * tiling.shard_windows
        channels = {} if dtype != "int8" else {"tap": Channels(np.zeros(WIDTH, "f4"), np.ones(WIDTH, "f4"))}
        taps, dtypes, policy = {"tap": WIDTH}, {"tap": dtype}, RowPolicy()
        self.info = StoreInfo(windows, windows, LENGTH, taps, dtypes, tiling, policy, {}, channels)
        self.root, self.store, self.raw = root, root / "store", root / "raw"
        self.raw.mkdir(exist_ok=True)
        random = np.random.default_rng(0)
        shape = (tiling.shard_windows, LENGTH)
        self.acts_NLD = random.standard_normal((*shape, WIDTH), np.float32).astype(ml_dtypes.bfloat16)
        self.tokens_NL, self.keep_NL = np.zeros(shape, np.int32), np.ones(shape, bool)
        self.shards = tiling.shards(windows)
        self.bytes = self.acts_NLD.nbytes * shards

    def write_store(self) -> None:
        shutil.rmtree(self.store, ignore_errors=True)
        folder = Folder(str(self.store))
        writer = ActivationWriter(folder, self.info)
        with ThreadPoolExecutor(2) as pool:
            entries = pool.map(
                lambda part: writer.write_shard(part, self.tokens_NL, self.keep_NL, {"tap": self.acts_NLD}), self.shards
            )
            ledger = dict(enumerate(entries))
        contents = finish_contents(folder, self.info, ledger)
        manifest = Manifest("harvest", SCHEMA_VERSION, "", {}, {}, {}, contents, {}, {}, "")
        folder.write("manifest.json", json.dumps(manifest.__dict__).encode())

    def write_raw(self) -> None:
        for number in range(len(self.shards)):
            with open(self.raw / str(number), "wb") as file:
                file.write(self.acts_NLD.view(np.uint8).data)
                file.flush()
                os.fsync(file.fileno())

    def open_reader(self) -> RowReader:
        store = ActivationStore(str(self.store), ("tap",))
        self.batch = {"tap": np.empty((BATCH_ROWS, WIDTH), store.info.decoded_dtype("tap"))}
        self.steps = iter(range(1 << 40))
        # The least that the train stage takes by default, but a small part of the store: where its pools are half of
        # an epoch, reading them cold waits for nothing but the first of them.
        pool_bytes = min(1 << 30, self.bytes // 6)
        self.reader = RowReader(store, ("tap",), seed=0, batch_rows=BATCH_ROWS, pool_bytes=pool_bytes)
        return self.reader

    def read_shuffled(self) -> None:
        for step in islice(self.steps, self.info.windows * LENGTH // BATCH_ROWS):
            self.reader.batch(step, out=self.batch)

    def copy_raw(self) -> None:
        buffer = np.empty(self.acts_NLD.nbytes, np.uint8)
        for number in range(len(self.shards)):
            with open(self.raw / str(number), "rb", buffering=0) as file:
                file.readinto(buffer)

    def dd(self) -> None:
        for number in range(len(self.shards)):
            subprocess.run(
                ["dd", f"if={self.raw / str(number)}", "of=/dev/null", "bs=4M"], check=True, capture_output=True
            )

    def compare(
        self, case: str, ours: Callable[[], None], bound: Callable[[], None], runs: int, cold: bool = False
    ) -> dict[str, object]:
        """Medians of both, taking turns."""
        seconds: dict[Callable[[], None], list[float]] = {ours: [], bound: []}
        for _ in range(runs):
            for side, place in ((ours, self.store), (bound, self.raw)):
                if cold:
                    drop_pages(place)
                start = time.perf_counter()
                side()
                seconds[side].append(time.perf_counter() - start)
        value, limit = (self.bytes / 1e6 / statistics.median(seconds[side]) for side in (ours, bound))
        ratio = statistics.median(b / a for a, b in zip(seconds[ours], seconds[bound], strict=True))
        found = {"value": round(value, 1), "unit": "MB/s", "bound": round(limit, 1), "bound_fraction": round(ratio, 3)}
        return {"bench": "store", "case": case, **found}


def plan_lines(root: Path, runs: int) -> list[dict[str, object]]:
    """Time and memory of opening a store of a billion rows and planning batches, medians over processes."""
    place = str(root / "planned")
    command = [sys.executable, str(Path(__file__).with_name("store_plan.py")), place]
    subprocess.run([*command, "write"], check=True)
    outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(runs)]
    shutil.rmtree(place)
    found = [json.loads(output) for output in outputs]
    lines = []
    for key, unit, scale, bound in (("seconds", "s", 1, 1), ("peak_bytes", "MB", 1e6, 200)):
        value = statistics.median(run[key] for run in found) / scale
        case = {"bench": "store", "case": "open, seek and plan 10^9 rows", "value": round(value, 3), "unit": unit}
        lines.append(case | {"bound": bound, "bound_fraction": round(bound / value, 3)})
    return lines


def peer_lines(found: dict[str, object], python: str, root: Path, bench: _Bench) -> list[dict[str, object]]:
    """``found`` beside each peer."""
    windows = min(bench.info.windows, (2 << 30) // (LENGTH * WIDTH * 2))
    batches = windows * LENGTH // BATCH_ROWS
    command = [python, str(Path(__file__).with_name("peers_store.py")), str(root / "peers")]
    command += [str(number) for number in (windows, LENGTH, WIDTH, BATCH_ROWS, batches)]
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    lines = []
    for peer, rows in json.loads(output.stdout.splitlines()[-1]).items():
        value = rows * WIDTH * 2 / 1e6
        lines.append(found | {"peer": peer, "peer_value": round(value, 1), "ratio": round(found["value"] / value, 2)})
    return lines


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="512 MB instead of 6 GB, 3 runs instead of 5")
    parser.add_argument("--folder", type=Path, help="disk to measure (default: a temporary folder)")
    parser.add_argument("--peer-python", metavar="PATH", help="a Python with torch, datasets and sae-lens")
    arguments = parser.parse_args()
    runs, shards = (3, 8) if arguments.quick else (5, 96)
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        for line in plan_lines(root, runs):
            print(json.dumps(line), flush=True)
        for dtype in ("bfloat16", "int8"):
            bench = _Bench(root, shards, dtype)
            bench.write_store()
            bench.write_raw()
            label = "" if dtype == "bfloat16" else " int8,"
            case = f"write,{label} with checksums and statistics"
            print(json.dumps(bench.compare(case, bench.write_store, bench.write_raw, runs)), flush=True)
            with bench.open_reader():
                bench.read_shuffled()
                case = f"shuffled read,{label} warm"
                found = bench.compare(case, bench.read_shuffled, bench.copy_raw, runs)
                python = None if label else arguments.peer_python
                for line in [found] if python is None else peer_lines(found, python, root, bench):
                    print(json.dumps(line), flush=True)
                case = f"shuffled read,{label} cold"
                print(json.dumps(bench.compare(case, bench.read_shuffled, bench.dd, runs, cold=True)), flush=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
