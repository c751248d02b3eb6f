"""Token windows through the language model to the activation store."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int32

from saex_pipe.common import resources
from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import DTYPES, ActivationWriter, StoreInfo, finish_contents
from saex_pipe.common.formats.manifest import Manifest, StageOutput, stage_output
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.common.formats.zarr_array import Tiling
from saex_pipe.common.llm import taps as tap_names
from saex_pipe.common.llm.architecture import Architecture
from saex_pipe.common.llm.load import load_model, read_architecture
from saex_pipe.common.mesh import check_batch, make_mesh
from saex_pipe.common.metrics_log import Progress, progress
from saex_pipe.common.preemption import StopRequest, graceful_stop
from saex_pipe.stages.harvest.config import Config
from saex_pipe.stages.harvest.forward import Forward, compile_forward
from saex_pipe.stages.harvest.overlap import DeviceClock, Passes, ahead
from saex_pipe.stages.harvest.shard import Batch, Shard, copy_rows

_CALIBRATION_WINDOWS = 64  # the median norm comes from the first windows, so every worker finds the same

# What is under way while the device computes, and so how much memory it takes: the tokens of one shard beyond the
# one in hand; two passes beyond the one whose result is awaited; and the activations of ``writers`` shards that are
# being written, of one that is full, and of those that the passes under way belong to.
_SHARDS_READ_AHEAD = 1
_PASSES_AHEAD = 2


def run(config: Config, *, force: bool = False) -> Manifest:
    """Write the activation store at ``config.out``."""
    with stage_output(config, force=force) as output, graceful_stop() as stop:
        if output.manifest is not None:
            return output.manifest
        corpus = TokenStore(config.tokens)
        mesh = make_mesh(config.model_parallel, devices=jax.local_devices())
        path = resources.fetch(config.model)
        architecture = read_architecture(path)
        taps = tap_names.expand(config.taps, architecture)
        _check(config, corpus, architecture, mesh)
        last_layer = tap_names.last_layer(taps, architecture)
        model = load_model(path, last_layer=last_layer, with_unembedding=False, dtype=config.compute_dtype, mesh=mesh)
        shape = (config.batch_windows, corpus.info.window_length)
        forward = compile_forward(model, taps, config.store_dtype, shape=shape, mesh=mesh)
        info = _store_info(config, corpus, architecture, taps, _row_policy(config, corpus, taps, forward))
        timings = _harvest(config, corpus, forward, ActivationWriter(output.folder, info), output, stop)
        contents = finish_contents(output.folder, info, output.ledger())
        return output.finish(contents=contents, totals=_totals(info, contents["rows"]), timings=timings)


def _harvest(
    config: Config,
    corpus: TokenStore,
    forward: Forward,
    writer: ActivationWriter,
    output: StageOutput,
    stop: StopRequest,
) -> dict[str, float]:
    """Write the shards that are not in the ledger yet, and say how long the device had to wait meanwhile."""
    info = writer.info
    finished = output.finished_shards()
    shards = [(n, windows) for n, windows in enumerate(info.tiling.shards(info.windows)) if n not in finished]
    total = info.windows * info.window_length
    done = total - sum(len(windows) for _, windows in shards) * info.window_length
    with (
        ThreadPoolExecutor(1) as reading,
        Passes(forward) as passes,
        ThreadPoolExecutor(config.writers) as writing,
        progress("harvesting", total, "tokens", done=done, log=output.metrics) as bar,
    ):
        reads = ahead((reading.submit(_read, corpus, *shard) for shard in shards), _SHARDS_READ_AHEAD)
        batches = (batch for read in reads for batch in Shard.empty(info, *read).batches(config.batch_windows))
        fetched = ahead((passes.submit(batch) for batch in batches), _PASSES_AHEAD)
        full = _full_shards(fetched, passes.clock, bar, stop)
        written = ahead((writing.submit(_write, writer, output, shard) for shard in full), config.writers)
        deque(written, maxlen=0)
        waited, seconds = passes.clock.read()
    stop.raise_if_requested()
    return {
        "loop_seconds": round(seconds, 3),
        "device_waiting_seconds": round(waited, 3),
        "device_waiting_share": round(waited / seconds, 4),
    }


def _read(
    corpus: TokenStore, number: int, windows: range
) -> tuple[int, range, Int32[np.ndarray, "N L"], Bool[np.ndarray, "N L"]]:
    """The number and windows of a shard, their tokens, and which of these are padding."""
    return number, windows, corpus.tokens(windows), corpus.documents(windows) < 0


def _full_shards(fetched: Iterable[Batch], clock: DeviceClock, bar: Progress, stop: StopRequest) -> Iterator[Shard]:
    """Each shard once its last batch is there, and none after a request to stop."""
    before = 0.0
    for batch in fetched:
        waited, seconds = clock.read()
        bar.advance(
            batch.tokens_NL.size,
            bytes=batch.bytes,
            waiting_seconds=waited - before,
            device_waiting_share=round(waited / seconds, 4),
        )
        before = waited
        if batch.completes_shard:
            yield batch.shard
            if stop.requested:
                return


def _write(writer: ActivationWriter, output: StageOutput, shard: Shard) -> None:
    """Write one shard and its ledger entry, in the background of later passes."""
    keep_NL = writer.info.row_policy.keep(shard.tokens_NL, shard.padding_NL, shard.norms)
    output.commit_shard(shard.number, writer.write_shard(shard.windows, shard.tokens_NL, keep_NL, shard.acts))


def _check(config: Config, corpus: TokenStore, architecture: Architecture, mesh: Mesh) -> None:
    check_batch(config.batch_windows, mesh, "harvest.batch_windows")
    architecture.check_window_length(corpus.info.window_length)
    architecture.check_largest_id(corpus.info.tokenizer["largest_id"])
    if outside := [p for p in config.drop_positions if not 0 <= p < corpus.info.window_length]:
        raise InputError(
            f"harvest.drop_positions = {list(config.drop_positions)}: {outside[0]} is outside the window",
            f"use positions from 0 to {corpus.info.window_length - 1}",
        )


def _row_policy(config: Config, corpus: TokenStore, taps: tuple[str, ...], forward: Forward) -> RowPolicy:
    """The rule for rows; limits on the norm come from the median over the first windows' other rows."""
    special = tuple(corpus.info.tokenizer["special_ids"]) if config.drop_special_tokens else ()
    policy = RowPolicy(special, config.drop_positions)
    if not config.drop_norm_multiple:
        return policy
    windows = range(min(_CALIBRATION_WINDOWS, corpus.info.train_windows))
    tokens_NL = corpus.tokens(windows)
    keep_NL = policy.keep(tokens_NL, corpus.documents(windows) < 0, {})
    if not keep_NL.any():
        raise InputError(
            f"{config.tokens}: the first {len(windows)} windows have no row that the drop_* settings keep",
            "drop fewer positions or give other text",
        )
    norms = {tap: np.empty(tokens_NL.shape, np.float32) for tap in taps}
    for start in range(0, len(windows), config.batch_windows):
        rows = slice(start, start + config.batch_windows)
        found = forward(tokens_NL[rows]).norms
        for tap in taps:
            copy_rows(found[tap], norms[tap][rows])
    limits = {tap: float(config.drop_norm_multiple * np.median(norms[tap][keep_NL])) for tap in taps}
    return RowPolicy(special, config.drop_positions, limits)


def _store_info(
    config: Config, corpus: TokenStore, architecture: Architecture, taps: tuple[str, ...], policy: RowPolicy
) -> StoreInfo:
    widths = {tap: tap_names.width(tap, architecture) for tap in taps}
    window_bytes = corpus.info.window_length * max(widths.values()) * DTYPES[config.store_dtype].itemsize
    windows = corpus.info.train_windows  # held-out windows are never harvested, so never trained on
    return StoreInfo(
        windows=windows,
        train_windows=windows,
        window_length=corpus.info.window_length,
        taps=widths,
        dtypes=dict.fromkeys(widths, config.store_dtype),
        tiling=_tiling(config, window_bytes, windows),
        row_policy=policy,
        source={"model": resources.absolute(config.model), "tokenizer": corpus.info.tokenizer},
    )


def _tiling(config: Config, window_bytes: int, windows: int) -> Tiling:
    """The cut of the store; a shard that is not set by hand is whole batches, so that no pass runs half empty."""
    tiling = Tiling.for_bytes(window_bytes, windows, config.shard_windows, config.chunk_windows)
    if config.shard_windows is not None:
        return tiling
    step = math.lcm(tiling.chunk_windows, config.batch_windows)
    return Tiling(-(-tiling.shard_windows // step) * step, tiling.chunk_windows)


def _totals(info: StoreInfo, rows: int) -> dict[str, int]:
    tokens = info.windows * info.window_length
    return {"tokens": tokens, "rows": rows, "bytes": info.activation_bytes}
