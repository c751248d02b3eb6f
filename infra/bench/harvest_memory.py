"""Memory and time of one forward pass on one long window, in a process of its own: one JSON line for the benchmark.

    python infra/bench/harvest_memory.py FOLDER LAYERS DTYPE LENGTH

``peak_bytes`` is what the resident set grew by while a first pass ran, above what it was with the model loaded and the
pass compiled; ``seconds`` is what a second pass takes. Freed memory goes back to the system here, unlike in the
stages, or what loading and compiling have left would be used again and not be counted. Linux only: writing 5 to
``clear_refs`` sets the peak back (proc(5)).
"""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from saex_pipe.common.formats.store_info import DTYPES
from saex_pipe.common.llm.load import load_model
from saex_pipe.common.mesh import make_mesh
from saex_pipe.stages.harvest.forward import compile_forward


def status_bytes(field: str) -> int:
    """A figure of this process's memory: ``VmRSS``, resident now, or ``VmHWM``, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    folder, layers, dtype, length = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    mesh = make_mesh(devices=jax.local_devices())
    model = load_model(folder, last_layer=layers - 1, with_unembedding=False, dtype=dtype, mesh=mesh)
    forward = compile_forward(model, {f"blocks.{layers}.resid_pre": DTYPES[dtype]}, shape=(1, length), mesh=mesh)
    tokens_NL = np.random.default_rng(0).integers(0, model.architecture.vocabulary, (1, length), dtype=np.int32)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    jax.block_until_ready(forward(tokens_NL))
    peak, start = status_bytes("VmHWM"), time.perf_counter()
    jax.block_until_ready(forward(tokens_NL))
    seconds = time.perf_counter() - start
    print(json.dumps({"peak_bytes": peak - before, "seconds": seconds}))


if __name__ == "__main__":
    main()
