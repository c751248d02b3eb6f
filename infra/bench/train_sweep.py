"""Four SAEs swept together against four runs, each from its first read to its last checkpoint.

    python infra/bench/train_sweep.py [--quick] [--megabytes-per-second RATE,...] [--shape BxDxF]

The train stage learns TopK SAEs of a wide tap, which differ in their learning rate, once in four runs one after the
other and once in one run of all (``train.learning_rate`` as a list). One JSON line for each place the store is in: the
local disk, and a bucket (``slow_bucket.py``) that delivers only so many megabytes a second, as one machine gets of one.

``value`` is the share of the four runs' time that the sweep takes in steady state: seconds from each run's first logged
step to its last, which no compilation is part of. ``bound`` is what it would be if reading and learning overlapped
fully, from the seconds of a step on the local disk and the bucket's rate; ``whole`` is the same share of all
seconds, compilation and export with it, and ``waiting`` the share of its time that one run alone waits for data.
Sides take turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from saex_pipe.common.host_memory import keep_freed_memory
from saex_pipe.stages.toy import config as toy
from saex_pipe.stages.toy.run import run as make_toy
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.run import run_sweep

RATES = (1e-4, 2e-4, 4e-4, 8e-4)
POOL_BYTES = 1 << 27  # small, so that reading goes on to the end rather than being over with the first batch
STORED_ROWS = 65_536
WINDOW = 128
FIRST_LOOK = 10  # steps until the first is logged


class Timed(NamedTuple):
    """Runs of the train stage, one after another."""

    steady: float  # seconds between logged steps
    whole: float  # seconds
    waiting: float  # share of the last run's time


class Bench:
    """Runs on the store at ``store``, with their results in numbered folders of ``place``."""

    def __init__(self, store: str, place: Path, shape: Sequence[int], steps: int) -> None:
        self._store, self._place, self._steps = store, place, steps
        self._rows, _, self._latents = shape
        self._runs = 0

    def alone(self) -> Timed:
        """Four runs."""
        parts = [self._timed([rate]) for rate in RATES]
        return Timed(sum(part.steady for part in parts), sum(part.whole for part in parts), parts[-1].waiting)

    def together(self) -> Timed:
        """One run."""
        return self._timed(RATES)

    def _timed(self, rates: Sequence[float]) -> Timed:
        self._runs += 1
        configs = [self._config(rate, number) for number, rate in enumerate(rates)]
        start = time.perf_counter()
        run_sweep(configs)
        whole = time.perf_counter() - start
        events = [json.loads(line) for line in (Path(configs[0].out) / "metrics.jsonl").read_text().splitlines()]
        steps = [event for event in events if "step" in event and "rows" in event]
        return Timed(steps[-1]["time"] - steps[0]["time"], whole, steps[-1]["waiting_share"])

    def _config(self, rate: float, number: int) -> Config:
        return Config.create(
            {
                "store": self._store,
                "out": str(self._place / f"run{self._runs}" / str(number)),
                "variant": "topk",
                "latents": self._latents,
                "k": 32,
                "learning_rate": rate,
                "batch_rows": self._rows,
                "rows": self._rows * self._steps,
                "pool_bytes": POOL_BYTES,
                "compute_dtype": "bfloat16",
            }
        )


@contextmanager
def bucket(folder: Path, rate: float) -> Iterator[str]:
    """``folder`` as a bucket that delivers ``rate`` MB/s; its URI."""
    command = [sys.executable, str(Path(__file__).with_name("slow_bucket.py")), str(folder), str(rate)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        os.environ["TENSORSTORE_GCS_HTTP_URL"] = process.stdout.readline().strip()
        os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "abc"
        try:
            yield "gs://bench"
        finally:
            process.stdin.close()


def case(store: str, found: Sequence[tuple[Timed, Timed]], bound: float) -> dict[str, Any]:
    """The line of one place, from four runs and one in each round."""
    value = statistics.median(together.steady / alone.steady for alone, together in found)
    return {
        "bench": "train_sweep",
        "case": f"four TopK SAEs from {store}",
        "value": round(value, 3),
        "unit": "of four runs",
        "bound": round(bound, 3),
        "bound_fraction": round(bound / value, 3),
        "whole": round(statistics.median(together.whole / alone.whole for alone, together in found), 3),
        "waiting": round(statistics.median(alone.waiting for alone, _ in found), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of fewer steps: four minutes")
    parser.add_argument(
        "--megabytes-per-second", default="20,40", help="of the bucket, a line for each; quick: the first"
    )
    parser.add_argument("--shape", default="1024x4096x2048", help="rows x width x latents")
    options = parser.parse_args()
    shape = [int(size) for size in options.shape.split("x")]
    rates = list(map(float, options.megabytes_per_second.split(",")))
    rounds, steps, rates = (1, 30, rates[:1]) if options.quick else (3, 60, rates)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        settings = {"out": str(place / "store"), "latents": 64, "width": shape[1], "rows": STORED_ROWS}
        make_toy(toy.Config.create(settings | {"store_dtype": "bfloat16", "window_length": WINDOW}))

        def measured(store: str, results: str) -> list[tuple[Timed, Timed]]:
            bench = Bench(store, place / results, shape, steps)
            return [(bench.alone(), bench.together()) for _ in range(rounds)]

        local = measured(str(place / "store"), "local")
        print(json.dumps(case("the local disk", local, 1.0)), flush=True)
        learning = statistics.median(alone.steady for alone, _ in local) / len(RATES) / (steps - FIRST_LOOK)
        for rate in rates:
            reading = shape[0] * shape[1] * 2 / (1e6 * rate)
            bound = max(reading, len(RATES) * learning) / (len(RATES) * max(reading, learning))
            with bucket(place / "store", rate) as uri:
                print(json.dumps(case(f"a bucket of {rate:g} MB/s", measured(uri, f"{rate:g}"), bound)), flush=True)


if __name__ == "__main__":
    main()
