"""The harvest stage of the quickstart on less text, as a whole: its speed, and how long the device waits."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from saex_pipe.common import resources
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.store_info import DTYPES
from saex_pipe.common.llm.load import load_model
from saex_pipe.common.mesh import make_mesh
from saex_pipe.pipelines import chain
from saex_pipe.stages.harvest.config import Config
from saex_pipe.stages.harvest.forward import compile_forward

PASSES = 6
SHARD_WINDOWS = 32  # a quarter of the quickstart's, so that less text has several shards


def stage_cases(place: Path, tokens: int) -> Iterator[dict[str, Any]]:
    """Run the corpus and the harvest stage on ``tokens`` tokens, then the forward pass alone."""
    out = place / "quickstart"
    changes = [f"corpus.max_tokens={tokens}", f"harvest.shard_windows={SHARD_WINDOWS}"]
    recipe = chain.with_assignments(chain.load_recipe("quickstart"), changes)
    for _ in chain.run_chain(recipe, str(out), stages=("corpus", "harvest")):
        pass
    manifest = Manifest.read(Folder(str(out / "activations")))
    assert manifest is not None
    config = Config.create(manifest.config)
    timings, harvested = manifest.timings, manifest.totals["tokens"]
    rate, alone = harvested / timings["loop_seconds"], forward_alone(config)
    case = f"harvest stage of the quickstart, {harvested} tokens in shards of {SHARD_WINDOWS} windows"
    yield {
        "bench": "harvest",
        "case": f"{case}, speed of its loop (bound: its forward pass alone)",
        "value": round(rate, 1),
        "unit": "tokens/s",
        "bound": round(alone, 1),
        "bound_fraction": round(rate / alone, 3),
    }
    share = timings["device_waiting_share"]
    yield {
        "bench": "harvest",
        "case": f"{case}, share of its loop's time with no forward pass queued or running",
        "value": share,
        "unit": "share",
        "bound": 0,
        "bound_fraction": round(1 - share, 4),
    }


def forward_alone(config: Config) -> float:
    """Tokens per second of the stage's forward pass with nothing else to do, one pass queued behind the other."""
    mesh = make_mesh(devices=jax.local_devices())
    layers = int(config.taps[0].split(".")[1])
    model = load_model(
        resources.fetch(config.model),
        last_layer=layers - 1,
        with_unembedding=False,
        dtype=config.compute_dtype,
        mesh=mesh,
    )
    shape = (config.batch_windows, 128)
    forward = compile_forward(model, dict.fromkeys(config.taps, DTYPES[config.store_dtype]), shape=shape, mesh=mesh)
    tokens_NL = np.random.default_rng(0).integers(0, model.architecture.vocabulary, shape, dtype=np.int32)
    jax.block_until_ready(forward(tokens_NL))
    start = time.perf_counter()
    jax.block_until_ready([forward(tokens_NL) for _ in range(PASSES)])
    return PASSES * tokens_NL.size / (time.perf_counter() - start)
