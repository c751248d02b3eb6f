"""A bucket on loopback that delivers only so many bytes a second: what a folder holds, as ``gs://bench``.

    python infra/bench/slow_bucket.py FOLDER MEGABYTES_PER_SECOND

Prints its URL once it serves, and ends with its standard input. All connections share the rate, as those of one
machine to a bucket do. It is the tests' server, in a process of its own so that it takes no turn of a reader's Python.
"""

import contextlib
import itertools
import sys
import threading
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from gcs_server import GcsServer, Handler

BUCKET = "bench"


class Rate:
    """Makes requests for objects wait until what was asked for before would have been delivered."""

    def __init__(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._free_at, self._lock = time.monotonic(), threading.Lock()

    def __call__(self, handler: Handler) -> bool:
        """Wait; False, as the request is still to be answered."""
        data, _ = handler.server.objects.get((BUCKET, handler.object_name()), (b"", 0))
        size = len(handler.range_of(len(data))) if handler.query.get("alt") == "media" else 0
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + size / self._bytes_per_second
            free_at = self._free_at
        time.sleep(max(0.0, free_at - time.monotonic()))
        return False


def main() -> None:
    folder, rate = Path(sys.argv[1]), 1e6 * float(sys.argv[2])
    with GcsServer() as server:
        generations = itertools.count(1)
        for file in filter(Path.is_file, folder.rglob("*")):
            server.objects[BUCKET, str(file.relative_to(folder))] = file.read_bytes(), next(generations)
        server.faults.append(Rate(rate))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        print(server.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            sys.stdin.read()
        server.shutdown()
        thread.join()


if __name__ == "__main__":
    main()
