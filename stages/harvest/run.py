"""Token windows through the language model to the activation store."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int32

from saex_pipe.common import resources
from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import DTYPES, ActivationWriter, StoreInfo, finish_contents
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.followed_store import Room, freed_below, frees_shards
from saex_pipe.common.formats.int8 import warn_of_added_error
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.stage_output import stage_output
from saex_pipe.common.formats.store_info import STORE, given_dtypes
from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.common.formats.zarr_array import Tiling
from saex_pipe.common.llm import taps as tap_names
from saex_pipe.common.llm.architecture import Architecture
from saex_pipe.common.llm.load import load_model, read_architecture
from saex_pipe.common.mesh import check_batch, make_mesh
from saex_pipe.common.metrics_log import MetricsLog, Progress, progress
from saex_pipe.common.preemption import StopRequest, graceful_stop
from saex_pipe.stages.harvest.calibration import Calibration, calibrate, row_policy
from saex_pipe.stages.harvest.config import PROCESS, Config
from saex_pipe.stages.harvest.forward import Forward, compile_forward
from saex_pipe.stages.harvest.overlap import DeviceClock, Passes, ahead
from saex_pipe.stages.harvest.shard import Batch, Shard
from saex_pipe.stages.harvest.stored import stored_dtypes
from saex_pipe.stages.harvest.work import Work

# What is under way while the device computes, and so how much memory it takes: the tokens of one shard beyond the
# one in hand; two passes beyond the one whose result is awaited; and the activations of ``writers`` shards that are
# being written, of one that is full, and of those that the passes under way belong to.
_SHARDS_READ_AHEAD = 1
_PASSES_AHEAD = 2
_LARGEST_SHARD_BYTES = 256 << 20


def run(config: Config, *, force: bool = False) -> Manifest:
    """Write the activation store at ``config.out``."""
    with stage_output(config, force=force) as output, graceful_stop() as stop:
        if output.manifest is not None:
            return output.manifest
        corpus = TokenStore(config.tokens)
        mesh = make_mesh(config.model_parallel, devices=jax.local_devices())
        path = resources.fetch(config.model)
        architecture = read_architecture(path)
        dtypes = stored_dtypes(config, architecture)
        _check(config, corpus, architecture, mesh)
        last_layer = tap_names.last_layer(tuple(dtypes), architecture)
        model = load_model(path, last_layer=last_layer, with_unembedding=False, dtype=config.compute_dtype, mesh=mesh)
        shape = (config.batch_windows, corpus.info.window_length)
        forward = compile_forward(model, given_dtypes(dtypes), shape=shape, mesh=mesh)
        calibration = calibrate(config, corpus, dtypes, forward, output.folder)
        info = _store_info(config, corpus, architecture, dtypes, calibration)
        # Before the store is there to be followed: its readers ask what room there is.
        _check_room(config, output.folder)
        room = None if config.max_store_bytes is None else Room(output.folder, info, config.max_store_bytes)
        writer = ActivationWriter(output.folder, info)
        work = Work(
            output,
            writer,
            worker=PROCESS,
            share=None if config.elastic else config.share,
            lease_seconds=config.lease_seconds,
            room=room,
            stop=stop,
        )
        timings = _harvest(config, corpus, forward, writer, work, output.metrics, stop)
        work.raise_if_shared()
        contents = finish_contents(output.folder, info, output.ledger())
        if room is not None:
            contents["freed_below"] = freed_below(output.folder)
        warn_of_added_error(config.out, contents["added_error"])
        return output.finish(contents=contents, totals=_totals(info, contents["rows"]), timings=timings)


def _harvest(
    config: Config,
    corpus: TokenStore,
    forward: Forward,
    writer: ActivationWriter,
    work: Work,
    metrics: MetricsLog,
    stop: StopRequest,
) -> dict[str, float]:
    """Write the shards that are this process's to make, and say how long the device had to wait meanwhile."""
    info = writer.info
    own = sum(len(work.shards[shard]) for shard in work.open_shards()) * info.window_length
    total = sum(map(len, work.share.of(work.shards))) * info.window_length
    with (
        ThreadPoolExecutor(1) as reading,
        Passes(forward) as passes,
        work,  # given back after what is being written has been
        ThreadPoolExecutor(config.writers) as writing,
        progress("harvesting", total, "tokens", done=total - own, log=metrics) as bar,
    ):
        while True:
            shards = ((shard, work.shards[shard]) for shard in work.round())
            reads = ahead((reading.submit(_read, corpus, *shard) for shard in shards), _SHARDS_READ_AHEAD)
            batches = (batch for read in reads for batch in Shard.empty(info, *read).batches(config.batch_windows))
            fetched = ahead((passes.submit(batch) for batch in batches), _PASSES_AHEAD)
            full = _full_shards(fetched, passes.clock, bar, stop)
            written = ahead((writing.submit(_write, writer, work, shard) for shard in full), config.writers)
            deque(written, maxlen=0)
            if not work.wait():
                break
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


def _write(writer: ActivationWriter, work: Work, shard: Shard) -> None:
    """Write one shard and its ledger entry, in the background of later passes."""
    told = shard.tokens_NL, shard.padding_NL, shard.norms
    keep_NL, outliers = writer.info.row_policy.keep(*told), writer.info.row_policy.outliers(*told)

    def write(over: Mapping[str, bytes]) -> dict[str, Any]:
        return writer.write_shard(shard.windows, shard.tokens_NL, keep_NL, shard.acts, outliers=outliers, over=over)

    work.write(shard.number, write)


def _check(config: Config, corpus: TokenStore, architecture: Architecture, mesh: Mesh) -> None:
    check_batch(config.batch_windows, mesh, "harvest.batch_windows")
    architecture.check_window_length(corpus.info.window_length)
    architecture.check_largest_id(corpus.info.tokenizer["largest_id"])
    if outside := [p for p in config.drop_positions if not 0 <= p < corpus.info.window_length]:
        raise InputError(
            f"harvest.drop_positions = {list(config.drop_positions)}: {outside[0]} is outside the window",
            f"use positions from 0 to {corpus.info.window_length - 1}",
        )


def _check_room(config: Config, folder: Folder) -> None:
    if config.max_store_bytes is not None and folder.read(STORE) is not None and not frees_shards(folder):
        raise InputError(
            f"harvest.max_store_bytes is set, and {folder.uri} was begun without it: its followers free nothing",
            "unset it, or begin another store",
        )


def _store_info(
    config: Config,
    corpus: TokenStore,
    architecture: Architecture,
    dtypes: Mapping[str, str],
    calibration: Calibration,
) -> StoreInfo:
    widths = {tap: tap_names.width(tap, architecture) for tap in dtypes}
    widest = max(width * DTYPES[dtypes[tap]].itemsize for tap, width in widths.items())
    window_bytes = corpus.info.window_length * widest
    windows = corpus.info.train_windows  # held-out windows are never harvested, so never trained on
    return StoreInfo(
        windows=windows,
        train_windows=windows,
        window_length=corpus.info.window_length,
        taps=widths,
        dtypes=dtypes,
        tiling=_tiling(config, window_bytes, windows),
        row_policy=replace(row_policy(config, corpus), norm_limits=calibration.norm_limits),
        source={"model": resources.absolute(config.model), "tokenizer": corpus.info.tokenizer},
        channels=calibration.channels,
    )


def _tiling(config: Config, window_bytes: int, windows: int) -> Tiling:
    """The cut of the store; a shard that is not set by hand is whole batches, so that no pass runs half empty.

    The chunk is the one next to the default with which such a shard stays within 256 MB. Where there is none, as with
    a batch of a large prime, the last pass of each shard is short of less than a chunk.
    """
    tiling = Tiling.for_bytes(window_bytes, windows, config.shard_windows, config.chunk_windows)
    if config.shard_windows is not None:
        return tiling
    default, batch = tiling.chunk_windows, config.batch_windows
    chunks = [default]
    if config.chunk_windows is None:
        chunks = sorted(range(-(-default // 2), 2 * default + 1), key=lambda chunk: abs(chunk - default))
    limit = max(_LARGEST_SHARD_BYTES // window_bytes, batch)
    for chunk in chunks:
        step = math.lcm(chunk, batch)
        shard = -(-tiling.shard_windows // step) * step
        if shard <= limit:
            return Tiling(shard, chunk)
    whole = -(-tiling.shard_windows // batch) * batch
    return Tiling(max(whole // default, 1) * default, default)


def _totals(info: StoreInfo, rows: int) -> dict[str, int]:
    tokens = info.windows * info.window_length
    return {"tokens": tokens, "rows": rows, "bytes": info.activation_bytes}
