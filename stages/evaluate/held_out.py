"""Held-out windows, a shard and a batch at a time, and the scores that need no model spliced."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.stage_output import StageOutput
from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.common.metrics_log import Progress, progress
from saex_pipe.common.preemption import StopRequest
from saex_pipe.common.sae.scores import Reconstruction
from saex_pipe.stages.evaluate.config import Config

_SHARD_TOKENS = 4096  # a shard is what a killed run has to do again
NOT_SPLICED: dict[str, Any] = dict.fromkeys(("ce_clean", "ce_sae", "ce_zero", "ce_recovered", "kl"))


def shards(
    config: Config, output: StageOutput, windows: range, window_length: int, stop: StopRequest
) -> Iterator[tuple[Progress, int, range]]:
    """The shards that are not in the ledger yet: the progress bar over all tokens, number and windows."""
    size = max(config.batch_windows, _SHARD_TOKENS // window_length)
    cut = [windows[start : start + size] for start in range(0, len(windows), size)]
    finished = output.finished_shards()
    done = sum(len(part) for number, part in enumerate(cut) if number in finished) * window_length
    with progress("evaluating", len(windows) * window_length, "tokens", done=done, log=output.metrics) as bar:
        for number, part in enumerate(cut):
            if number not in finished:
                yield bar, number, part
                stop.raise_if_requested()


def batches(config: Config, corpus: TokenStore, shard: range) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """How many windows a batch has, its token ids and which of them are padding; the last is filled up with padding.

    All are of ``config.batch_windows``, so that a function of them compiles once.
    """
    for start in range(0, len(shard), config.batch_windows):
        part = shard[start : start + config.batch_windows]
        missing = ((0, config.batch_windows - len(part)), (0, 0))
        tokens_NL = np.pad(corpus.tokens(part), missing)
        yield len(part), tokens_NL, np.pad(corpus.documents(part) < 0, missing, constant_values=True)


def reconstruction_scores(entries: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Of all rows, from the ledger entries of all shards."""
    merged = merged_reconstruction([entry["reconstruction"] for entry in entries])
    if merged.rows == 0:
        raise InputError("no held-out token is a row by the policy the SAE was trained with", "hold out more text")
    return {
        "l0": merged.l0,
        "fvu": merged.fvu,
        "dead_fraction": merged.dead_fraction,
        "rows": merged.rows,
        "tokens": tokens,
    }


def merged_reconstruction(parts: Sequence[dict[str, Any]]) -> Reconstruction:
    """The sums over all rows from those of parts, as JSON values."""
    merged = Reconstruction()
    for part in parts:
        merged.include(Reconstruction.from_json(part))
    return merged
