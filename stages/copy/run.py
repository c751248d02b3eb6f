"""An activation store in another shape.

Shards that stay as they are go over as they are, with their statistics; those of the others are taken anew from what is
written.
"""

from typing import Any

import numpy as np

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import (
    DTYPES,
    ActivationStore,
    ActivationWriter,
    StoreInfo,
    finish_contents,
)
from saex_pipe.common.formats.int8 import Channels, warn_of_added_error
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.stage_output import stage_output
from saex_pipe.common.formats.statistics import ActivationStatistics
from saex_pipe.common.formats.store_copy import copy_shard
from saex_pipe.common.formats.zarr_array import Tiling
from saex_pipe.common.metrics_log import progress
from saex_pipe.common.preemption import graceful_stop
from saex_pipe.stages.copy.config import Config

_CALIBRATION_WINDOWS = 64


def run(config: Config, *, force: bool = False) -> Manifest:
    """Write the store at ``config.out``."""
    with stage_output(config, force=force) as output, graceful_stop() as stop:
        if output.manifest is not None:
            return output.manifest
        source = ActivationStore(config.store, config.taps)
        info = _info(config, source)
        writer, finished = ActivationWriter(output.folder, info), output.finished_shards()
        shards = info.tiling.shards(info.windows)
        done = sum(len(shards[shard]) for shard in finished)
        with progress("copying", info.windows, "windows", done=done, log=output.metrics) as bar:
            for shard, windows in enumerate(shards):
                if shard in finished:
                    continue
                entry = copy_shard(source, shard, output.folder, info) or _rewritten(source, writer, windows)
                output.commit_shard(shard, entry)
                bar.advance(len(windows), bytes=len(windows) * info.shard_bytes // info.tiling.shard_windows)
                stop.raise_if_requested()
        contents = finish_contents(output.folder, info, output.ledger())
        contents["outlier_share"] = source.manifest.contents["outlier_share"]
        old_shares = source.manifest.contents.get("tap_outlier_share", {})
        contents["tap_outlier_share"] = {tap: old_shares[tap] for tap in info.taps if tap in old_shares}
        old_error = source.manifest.contents["added_error"]  # which rows that were in one byte keep
        contents["added_error"] |= {tap: old_error[tap] for tap in info.channels if tap in old_error}
        warn_of_added_error(config.out, contents["added_error"])
        tokens = info.windows * info.window_length
        return output.finish(
            contents=contents, totals={"tokens": tokens, "rows": contents["rows"], "bytes": info.activation_bytes}
        )


def _rewritten(source: ActivationStore, writer: ActivationWriter, windows: range) -> dict[str, Any]:
    """Write one shard from the rows of ``source``, and return its ledger entry."""
    acts = {tap: source.acts(tap, windows) for tap in writer.info.taps}
    with np.errstate(over="ignore"):  # what float16 cannot hold is refused when it is written
        acts = {
            tap: found if (dtype := writer.info.dtypes[tap]) == "int8" else found.astype(DTYPES[dtype], copy=False)
            for tap, found in acts.items()
        }
    return writer.write_shard(windows, source.tokens(windows), source.keep(windows), acts)


def _info(config: Config, source: ActivationStore) -> StoreInfo:
    old = source.info
    windows = old.windows if config.windows is None else config.windows
    if windows > old.windows:
        raise InputError(f"copy.windows = {windows}: {config.store} has {old.windows}", "ask for no more than it has")
    taps = {tap: old.taps[tap] for tap in config.taps or old.taps}
    dtypes = {tap: config.dtype or old.dtypes[tap] for tap in taps}
    chunk = config.chunk_windows or min(old.tiling.chunk_windows, config.shard_windows or old.tiling.chunk_windows)
    shard = config.shard_windows or old.tiling.shard_windows
    return StoreInfo(
        windows=windows,
        train_windows=min(old.train_windows, windows),
        window_length=old.window_length,
        taps=taps,
        dtypes=dtypes,
        tiling=Tiling(-(-shard // chunk) * chunk, chunk),
        row_policy=old.row_policy,
        source=old.source,
        channels={tap: _channels(source, tap) for tap, dtype in dtypes.items() if dtype == "int8"},
    )


def _channels(source: ActivationStore, tap: str) -> Channels:
    """Those that the store has, or of its first windows."""
    if tap in source.info.channels:
        return source.info.channels[tap]
    windows = range(min(_CALIBRATION_WINDOWS, source.info.windows))
    return Channels.of(ActivationStatistics.of_rows(source.acts(tap, windows), source.train_keep(windows)))
