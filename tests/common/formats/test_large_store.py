"""A store of a billion rows that has an index but no data: opening, seeking and planning cost next to nothing."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, time
import numpy as np
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.row_reader import RowReader
from saex_pipe.common.shuffle import RowOrder

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

np.random.Generator(np.random.Philox(key=0)).permutation(10)  # what NumPy loads once is not the store's
before, start = peak(), time.perf_counter()
store = ActivationStore(sys.argv[1], ("a",))
order = store.row_order(seed=0, pool_rows=1 << 14, lanes=8)
opened = time.perf_counter() - start
rows = 0
for step in (0, 123_456, order.rows // 4096 - 2):
    for part in order.span(step * 4096, (step + 1) * 4096):
        order.chunks(part.pool)
        rows += len(order.dealt(part))
planned = time.perf_counter() - start
print(json.dumps({"rows": store.rows, "dealt": rows, "opened": opened, "planned": planned, "grown": peak() - before}))
"""


def write_index(place):
    """Everything of a store but its arrays: 10^9 rows of 2048 in chunks of 256 rows."""
    import numpy as np

    from saex_pipe.common.formats.activations import SCHEMA_VERSION, StoreInfo
    from saex_pipe.common.formats.chunk_index import write_index_objects
    from saex_pipe.common.formats.folder import Folder
    from saex_pipe.common.formats.manifest import Manifest
    from saex_pipe.common.formats.row_policy import RowPolicy
    from saex_pipe.common.formats.statistics import ActivationStatistics
    from saex_pipe.common.formats.zarr_array import Tiling

    windows = 7_874_016
    info = StoreInfo(windows, windows, 128, {"a": 2048}, {"a": "bfloat16"}, Tiling(256, 2), RowPolicy(), {})
    rows = np.full(windows // 2, 254, np.int32)
    arrays = {name: np.arange(windows // 2, dtype=np.uint32) for name in info.layouts()}
    folder = Folder(str(place))
    contents = info.to_json() | {
        "rows": int(rows.sum(dtype=np.int64)),
        "statistics": {"a": ActivationStatistics.of_rows(np.ones((1, 2048), np.float32)).to_json()},
        "index": write_index_objects(folder, rows, arrays),
    }
    manifest = Manifest("harvest", SCHEMA_VERSION, "d", {}, {}, {}, contents, {}, {}, "")
    folder.write("manifest.json", json.dumps(manifest.__dict__).encode())


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_a_billion_rows_open_seek_and_plan_in_a_second_and_200_megabytes(tmp_path):
    write_index(tmp_path)
    output = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=True, capture_output=True, text=True)
    found = json.loads(output.stdout)
    assert found["rows"] >= 10**9
    assert found["dealt"] == 3 * 4096
    assert 50e6 < found["grown"] < 200e6, found
    # No test of a duration: the billionth row costs what the first one does, once the chunks are permuted.
    assert found["planned"] < 30, found
