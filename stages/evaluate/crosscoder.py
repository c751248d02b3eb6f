"""Scores of a crosscoder on held-out text: how well it reconstructs each of its taps, and all as one row.

Nothing is spliced into the model: which of the taps to replace, all at once or one by one, is another question.
"""

from itertools import accumulate
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.checkpoint import SavedSae
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.stage_output import StageOutput
from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.common.llm import taps as tap_names
from saex_pipe.common.llm.architecture import Architecture
from saex_pipe.common.llm.params import LanguageModel
from saex_pipe.common.llm.splice import make_capture
from saex_pipe.common.preemption import StopRequest
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.scores import Reconstruction
from saex_pipe.stages.evaluate.config import Config
from saex_pipe.stages.evaluate.held_out import (
    NOT_SPLICED,
    batches,
    merged_reconstruction,
    reconstruction_scores,
    shards,
)
from saex_pipe.stages.evaluate.splice import keep_rows


class Subject(NamedTuple):
    """What is scored, and on what."""

    model: LanguageModel
    sae: Sae
    taps: tuple[str, ...]
    policy: RowPolicy
    corpus: TokenStore


def require_taps(config: Config, saved: SavedSae, architecture: Architecture) -> None:
    """Refuse a model whose taps are not those of the crosscoder."""
    if config.tap is not None:
        raise InputError(f"evaluate.tap = {config.tap!r}: the crosscoder reads {', '.join(saved.taps)}", "unset it")
    widths = [tap_names.width(tap, architecture) for tap in saved.taps]
    if widths != saved.cfg["tap_widths"]:
        raise InputError(
            f"{', '.join(saved.taps)} have widths {widths}, the crosscoder was trained on {saved.cfg['tap_widths']}",
            "give the model it was trained on",
        )


def crosscoder_scores(
    config: Config, output: StageOutput, subject: Subject, windows: range, stop: StopRequest
) -> dict[str, Any]:
    """``fvu`` of the taps together, and ``fvu.TAP`` of each."""
    length = subject.corpus.info.window_length
    capture = make_capture([*subject.taps, *(subject.policy.norm_limits or {})])
    for bar, number, shard in shards(config, output, windows, length, stop):
        together, each = Reconstruction(), [Reconstruction() for _ in subject.taps]
        for windows_of_batch, tokens_NL, padding_NL in batches(config, subject.corpus, shard):
            found = capture(subject.model, jnp.asarray(tokens_NL))
            keep_NL = keep_rows(subject.policy, tokens_NL, padding_NL, found)
            rows_NLD = jnp.concatenate([found[tap] for tap in subject.taps], axis=-1)
            _add(together, each, subject.sae, rows_NLD, keep_NL)
            bar.advance(windows_of_batch * length)
        by_tap = {tap: sums.to_json() for tap, sums in zip(subject.taps, each, strict=True)}
        output.commit_shard(number, {"reconstruction": together.to_json(), "by_tap": by_tap})
    entries = [entry for _, entry in sorted(output.ledger().items())]
    scores = reconstruction_scores(entries, len(windows) * length) | NOT_SPLICED
    for tap in subject.taps:
        scores[f"fvu.{tap}"] = merged_reconstruction([entry["by_tap"][tap] for entry in entries]).fvu
    return scores


def _add(together: Reconstruction, each: list[Reconstruction], sae: Sae, rows_NLD: Array, keep_NL: np.ndarray) -> None:
    rows_BD, recon_BD = (np.asarray(acts, np.float32)[keep_NL] for acts in (rows_NLD, sae.reconstruct(rows_NLD)))
    active_BF = np.asarray(sae.encode(rows_NLD) > 0)[keep_NL]
    active_B, fired_F = active_BF.sum(axis=1), active_BF.any(axis=0)
    together.add(rows_BD, recon_BD, active_B, fired_F)
    cuts = list(accumulate(sae.variant.tap_widths))[:-1]
    parts = (np.split(side_BD, cuts, axis=1) for side_BD in (rows_BD, recon_BD))
    for sums, part_BD, recon_part_BD in zip(each, *parts, strict=True):
        sums.add(part_BD, recon_part_BD, active_B, fired_F)
