"""Token windows through the language model to the activation store."""

import math
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Bool, Int32

from saex_pipe.common import resources
from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import DTYPES, ActivationWriter, StoreInfo, merged_contents
from saex_pipe.common.formats.manifest import Manifest, StageOutput, stage_output
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.common.formats.zarr_array import Tiling
from saex_pipe.common.llm import taps as tap_names
from saex_pipe.common.llm.architecture import Architecture
from saex_pipe.common.llm.load import load_model, read_architecture
from saex_pipe.common.metrics_log import progress
from saex_pipe.common.preemption import graceful_stop
from saex_pipe.stages.harvest.config import Config
from saex_pipe.stages.harvest.forward import Forward, Harvested, make_forward

_CALIBRATION_WINDOWS = 64  # the median norm comes from the first windows, so every worker finds the same


def run(config: Config, *, force: bool = False) -> Manifest:
    """Write the activation store at ``config.out``."""
    with stage_output(config, force=force) as output, graceful_stop() as stop:
        if output.manifest is not None:
            return output.manifest
        corpus = TokenStore(config.tokens)
        path = resources.fetch(config.model)
        architecture = read_architecture(path)
        _check(config, corpus, architecture)
        last_layer = tap_names.last_layer(config.taps, architecture)
        model = load_model(path, last_layer=last_layer, with_unembedding=False, dtype=config.compute_dtype)
        forward = make_forward(model, config.taps, config.store_dtype, config.batch_windows)
        info = _store_info(config, corpus, architecture, _row_policy(config, corpus, forward))
        writer = ActivationWriter(output.folder, info)

        shards = info.tiling.shards(info.windows)
        finished = output.finished_shards()
        done = sum(len(shards[shard]) for shard in finished) * info.window_length
        total = info.windows * info.window_length
        with (
            ThreadPoolExecutor(1) as behind,
            progress("harvesting", total, "tokens", done=done, log=output.metrics) as bar,
        ):
            pending: Future[None] | None = None
            for shard, windows in enumerate(shards):
                if shard in finished:
                    continue
                tokens_NL = corpus.tokens(windows)
                padding_NL = corpus.documents(windows) < 0
                harvested = []
                for start in range(0, len(windows), config.batch_windows):
                    batch_NL = tokens_NL[start : start + config.batch_windows]
                    harvested.append(fetch(forward(batch_NL)))
                    bar.advance(batch_NL.size, bytes=sum(acts.nbytes for acts in harvested[-1].acts.values()))
                if pending is not None:
                    pending.result()
                pending = behind.submit(_write, writer, output, shard, windows, tokens_NL, padding_NL, harvested)
                if stop.requested:
                    pending.result()
                    stop.raise_if_requested()
            if pending is not None:
                pending.result()
        contents = merged_contents(info, output.ledger())
        return output.finish(contents=contents, totals=_totals(info, contents["rows"]))


def fetch(harvested: Harvested) -> Harvested:
    """The arrays of one batch on the host."""
    fetched: Harvested = jax.device_get(harvested)
    return fetched


def _write(
    writer: ActivationWriter,
    output: StageOutput,
    shard: int,
    windows: range,
    tokens_NL: Int32[np.ndarray, "N L"],
    padding_NL: Bool[np.ndarray, "N L"],
    harvested: list[Harvested],
) -> None:
    """Write one shard and its ledger entry, in the background of the next shard's forward passes."""
    taps = writer.info.taps
    norms = {tap: np.concatenate([batch.norms[tap] for batch in harvested]) for tap in taps}
    acts = {tap: np.concatenate([batch.acts[tap] for batch in harvested]) for tap in taps}
    keep_NL = writer.info.row_policy.keep(tokens_NL, padding_NL, norms)
    output.commit_shard(shard, writer.write_shard(windows, tokens_NL, keep_NL, acts))


def _check(config: Config, corpus: TokenStore, architecture: Architecture) -> None:
    tap_names.validate(config.taps, architecture)
    architecture.check_window_length(corpus.info.window_length)
    architecture.check_largest_id(corpus.info.tokenizer["largest_id"])
    if outside := [p for p in config.drop_positions if not 0 <= p < corpus.info.window_length]:
        raise InputError(
            f"harvest.drop_positions = {list(config.drop_positions)}: {outside[0]} is outside the window",
            f"use positions from 0 to {corpus.info.window_length - 1}",
        )


def _row_policy(config: Config, corpus: TokenStore, forward: Forward) -> RowPolicy:
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
    batches = []
    for start in range(0, len(windows), config.batch_windows):
        batches.append(fetch(forward(tokens_NL[start : start + config.batch_windows])).norms)
    limits = {}
    for tap in config.taps:
        norms_NL = np.concatenate([batch[tap] for batch in batches])
        limits[tap] = float(config.drop_norm_multiple * np.median(norms_NL[keep_NL]))
    return RowPolicy(special, config.drop_positions, limits)


def _store_info(config: Config, corpus: TokenStore, architecture: Architecture, policy: RowPolicy) -> StoreInfo:
    taps = {tap: tap_names.width(tap, architecture) for tap in config.taps}
    window_bytes = corpus.info.window_length * max(taps.values()) * DTYPES[config.store_dtype].itemsize
    windows = corpus.info.train_windows  # held-out windows are never harvested, so never trained on
    return StoreInfo(
        windows=windows,
        train_windows=windows,
        window_length=corpus.info.window_length,
        taps=taps,
        dtype=config.store_dtype,
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
    return {"tokens": tokens, "rows": rows, "bytes": tokens * sum(info.taps.values()) * DTYPES[info.dtype].itemsize}
