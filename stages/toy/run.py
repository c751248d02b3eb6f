"""Synthetic activations with a known dictionary, written as an ordinary activation store with its truth."""

import numpy as np

from saex_pipe.common.formats.activations import DTYPES, ActivationWriter, StoreInfo, finish_contents
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.stage_output import stage_output
from saex_pipe.common.formats.toy_truth import create_codes, write_dictionary
from saex_pipe.common.formats.zarr_array import Tiling, write_windows
from saex_pipe.common.metrics_log import progress
from saex_pipe.common.preemption import graceful_stop
from saex_pipe.stages.toy.config import Config
from saex_pipe.stages.toy.generate import generate_rows, make_truth

TAP = "toy"


def run(config: Config, *, force: bool = False) -> Manifest:
    """Write the activation store and its truth at ``config.out``."""
    with stage_output(config, force=force) as output, graceful_stop() as stop:
        if output.manifest is not None:
            return output.manifest
        truth = make_truth(
            config.latents, config.width, config.active, config.frequency_decay, config.correlation, config.seed
        )
        write_dictionary(output.folder, truth.dictionary_FD)
        info = _store_info(config)
        writer = ActivationWriter(output.folder, info)
        codes = create_codes(
            output.folder,
            windows=info.windows,
            window_length=info.window_length,
            latents=config.latents,
            tiling=info.tiling,
        )
        shards = info.tiling.shards(info.windows)
        finished = output.finished_shards()
        done = sum(len(shards[shard]) for shard in finished) * info.window_length
        with progress("generating", info.windows * info.window_length, "rows", done=done, log=output.metrics) as bar:
            for shard, windows in enumerate(shards):
                if shard in finished:
                    continue
                shape = (len(windows), info.window_length)
                start, count = windows.start * info.window_length, len(windows) * info.window_length
                rows = generate_rows(truth, start, count, noise=config.noise, seed=config.seed)
                write_windows(codes, windows, rows.codes_BF.reshape(*shape, -1))
                acts_NLD = rows.acts_BD.astype(DTYPES[config.store_dtype]).reshape(*shape, -1)
                entry = writer.write_shard(windows, np.zeros(shape, np.int32), np.ones(shape, bool), {TAP: acts_NLD})
                output.commit_shard(shard, entry)
                bar.advance(count, bytes=acts_NLD.nbytes)
                stop.raise_if_requested()
        contents = finish_contents(output.folder, info, output.ledger())
        rows_total = info.windows * info.window_length
        size = rows_total * (config.width * DTYPES[config.store_dtype].itemsize + 4 * config.latents)
        return output.finish(contents=contents, totals={"rows": rows_total, "bytes": size})


def _store_info(config: Config) -> StoreInfo:
    windows = -(-config.rows // config.window_length)
    held_out = round(windows * config.holdout_fraction)
    window_bytes = config.window_length * max(config.width, 2 * config.latents) * 4
    return StoreInfo(
        windows=windows,
        train_windows=windows - held_out,
        window_length=config.window_length,
        taps={TAP: config.width},
        dtypes={TAP: config.store_dtype},
        tiling=Tiling.for_bytes(window_bytes, windows),
        row_policy=RowPolicy(),
        source={"toy": config.result_fields()},
    )
