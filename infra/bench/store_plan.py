"""A store of a billion rows with an index but no data, opened in a process of its own: one JSON line for ``store.py``.

    python infra/bench/store_plan.py FOLDER [write]

``seconds`` is what it takes to open the store and to plan batches at its start, middle and end; ``peak_bytes`` is what
the process's peak memory grew by meanwhile. With ``write`` it makes the store. Linux only, for the peak.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from saex_pipe.common.formats.activations import SCHEMA_VERSION, ActivationStore, StoreInfo
from saex_pipe.common.formats.chunk_index import write_index_objects
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.statistics import ActivationStatistics
from saex_pipe.common.formats.zarr_array import Tiling

ROWS, LENGTH, WIDTH, BATCH_ROWS = 10**9, 128, 2048, 4096
CHUNK_WINDOWS = 2  # an eighth of the default, so eight times the chunks


def write_index(place: str) -> None:
    """Everything of the store but its arrays."""
    windows = -(-ROWS // (LENGTH * CHUNK_WINDOWS)) * CHUNK_WINDOWS
    tiling = Tiling(256, CHUNK_WINDOWS)
    info = StoreInfo(windows, windows, LENGTH, {"tap": WIDTH}, {"tap": "bfloat16"}, tiling, RowPolicy(), {})
    rows = np.full(windows // CHUNK_WINDOWS, LENGTH * CHUNK_WINDOWS, np.int32)
    arrays = {name: np.arange(len(rows), dtype=np.uint32) for name in info.layouts()}
    folder = Folder(place)
    contents = info.to_json() | {
        "rows": int(rows.sum(dtype=np.int64)),
        "statistics": {"tap": ActivationStatistics.of_rows(np.ones((1, WIDTH), np.float32)).to_json()},
        "index": write_index_objects(folder, rows, arrays),
    }
    manifest = Manifest("harvest", SCHEMA_VERSION, "", {}, {}, {}, contents, {}, {}, "")
    folder.write("manifest.json", json.dumps(manifest.__dict__).encode())


def peak_bytes() -> int:
    """The peak of this process's resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    if sys.argv[2:] == ["write"]:
        write_index(sys.argv[1])
        return
    np.random.Generator(np.random.Philox(key=0)).permutation(10)  # what NumPy loads once is not the store's
    before, start = peak_bytes(), time.perf_counter()
    store = ActivationStore(sys.argv[1], ("tap",))
    order = store.row_order(seed=0, pool_rows=1 << 14, lanes=8)
    batches = order.rows // BATCH_ROWS
    for step in (0, batches // 2, batches - 1):
        for part in order.span(step * BATCH_ROWS, (step + 1) * BATCH_ROWS):
            order.chunks(part.pool)
            order.dealt(part)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes() - before}))


if __name__ == "__main__":
    main()
