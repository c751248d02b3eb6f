"""Scores of an SAE on rows it was never trained on."""

import json
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from saex_pipe.common import resources
from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.checkpoint import SavedSae, read_sae
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.stage_output import StageOutput, stage_output
from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.common.formats.toy_truth import read_dictionary
from saex_pipe.common.llm import taps as tap_names
from saex_pipe.common.llm.architecture import Architecture
from saex_pipe.common.llm.load import load_model
from saex_pipe.common.llm.splice import Taps, make_capture, resume_place
from saex_pipe.common.metrics_log import Progress, progress
from saex_pipe.common.preemption import StopRequest, graceful_stop
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.saelens import from_saelens
from saex_pipe.common.sae.scores import Reconstruction, ce_recovered, match_dictionary
from saex_pipe.stages.evaluate.config import Config
from saex_pipe.stages.evaluate.splice import Sums, add_batch, keep_rows, make_scorer

_SHARD_TOKENS = 4096  # a shard is what a killed run has to do again


def run(config: Config, *, force: bool = False) -> Manifest:
    """Write ``scores.json`` at ``config.out``."""
    if (config.store is None) == (config.model is None or config.tokens is None):
        raise InputError(
            "evaluate needs either evaluate.model and evaluate.tokens, or the evaluate.store of a toy",
            "set one of the two",
        )
    with stage_output(config, force=force) as output, graceful_stop() as stop:
        if output.manifest is not None:
            return output.manifest
        saved = read_sae(config.sae)
        scores = _on_text(config, output, saved, stop) if config.store is None else _on_toy(config, output, saved, stop)
        # JSON has no NaN: a score without a value, such as the share of no difference, is null.
        scores = {name: None if value is not None and math.isnan(value) else value for name, value in scores.items()}
        data = (json.dumps(scores, indent=1, sort_keys=True) + "\n").encode()
        output.folder.write("scores.json", data)
        unit = "tokens" if config.store is None else "rows"
        return output.finish(contents=scores, totals={unit: scores[unit], "bytes": len(data)})


def _sae(saved: SavedSae, config: Config) -> Sae:
    return Sae(*from_saelens(saved.cfg, saved.tensors), Compute(dtype=config.compute_dtype))


def _on_text(config: Config, output: StageOutput, saved: SavedSae, stop: StopRequest) -> dict[str, Any]:
    """Reconstruction, cross-entropy and divergence on held-out windows of text."""
    assert config.model is not None
    assert config.tokens is not None
    corpus = TokenStore(config.tokens)
    windows = range(corpus.info.train_windows, corpus.info.windows)
    windows = windows[: config.max_tokens // corpus.info.window_length]
    if not windows:
        raise InputError(
            f"{config.tokens} has {corpus.info.windows - corpus.info.train_windows} held-out windows, "
            f"and evaluate.max_tokens = {config.max_tokens:,} admits none of {corpus.info.window_length} tokens",
            "raise corpus.holdout_fraction or evaluate.max_tokens",
        )
    model = load_model(resources.fetch(config.model), dtype=config.compute_dtype)
    model.architecture.check_largest_id(corpus.info.tokenizer["largest_id"])
    taps = _taps(config, saved, model.architecture)
    sae, policy = _sae(saved, config), RowPolicy.from_json(saved.saex["row_policy"])
    base = resume_place(taps, model.architecture)
    capture = make_capture([*([] if base is None else [base]), *taps, *(policy.norm_limits or {})])
    score = make_scorer(taps, base)

    for bar, number, shard in _shards(config, output, windows, corpus.info.window_length, stop):
        sums = Sums({}, 0, Reconstruction())
        for start in range(0, len(shard), config.batch_windows):
            part = shard[start : start + config.batch_windows]
            tokens_NL, padding_NL = corpus.tokens(part), corpus.documents(part) < 0
            missing = config.batch_windows - len(part)  # the last batch is filled up, so that it compiles once
            tokens_NL = np.pad(tokens_NL, ((0, missing), (0, 0)))
            padding_NL = np.pad(padding_NL, ((0, missing), (0, 0)), constant_values=True)
            found = capture(model, jnp.asarray(tokens_NL))
            keep_NL = keep_rows(policy, tokens_NL, padding_NL, found)
            scores = score(model, sae, tokens_NL, found, keep_NL)
            sums = add_batch(sums, scores, keep_NL, padding_NL)
            bar.advance(len(part) * corpus.info.window_length)
        entry = {"nats": sums.nats, "predicted": sums.predicted, "reconstruction": sums.reconstruction.to_json()}
        output.commit_shard(number, entry)

    entries = [entry for _, entry in sorted(output.ledger().items())]
    predicted = sum(entry["predicted"] for entry in entries)
    if predicted == 0:
        raise InputError(
            f"no token of the {len(windows)} held-out windows is predicted by another", "give longer documents"
        )
    nats = {name: sum(entry["nats"][name] for entry in entries) / predicted for name in entries[0]["nats"]}
    return _reconstruction_scores(entries, len(windows) * corpus.info.window_length) | {
        "ce_clean": nats["clean"],
        "ce_sae": nats["sae"],
        "ce_zero": nats["zero"],
        "ce_recovered": ce_recovered(nats["clean"], nats["sae"], nats["zero"]),
        "kl": nats["kl"],
    }


def _on_toy(config: Config, output: StageOutput, saved: SavedSae, stop: StopRequest) -> dict[str, Any]:
    """Reconstruction of held-out rows, and the match of the decoder with the true dictionary."""
    assert config.store is not None
    tap = saved.saex["tap"]
    store = ActivationStore(config.store, (tap,))
    windows = range(store.info.train_windows, store.info.windows)
    windows = windows[: config.max_tokens // store.info.window_length]
    dictionary_FD = read_dictionary(config.store)
    if not windows:
        raise InputError(f"{config.store} has no held-out windows", "raise toy.holdout_fraction or evaluate.max_tokens")
    sae = _sae(saved, config)
    for bar, number, shard in _shards(config, output, windows, store.info.window_length, stop):
        reconstruction = Reconstruction()
        rows_BD = store.acts(tap, shard)[store.keep(shard)].astype(np.float32)
        codes = sae.codes_sparse(rows_BD)
        fired_F = np.zeros(sae.latents, bool)
        fired_F[np.asarray(codes.latents_BK)[np.asarray(codes.values_BK) > 0]] = True
        reconstruction.add(rows_BD, np.asarray(sae.reconstruct(rows_BD)), np.asarray(codes.active_B), fired_F)
        bar.advance(len(shard) * store.info.window_length)
        output.commit_shard(number, {"reconstruction": reconstruction.to_json()})
    entries = [entry for _, entry in sorted(output.ledger().items())]
    match = match_dictionary(dictionary_FD, saved.tensors["W_dec"])
    no_model = dict.fromkeys(("ce_clean", "ce_sae", "ce_zero", "ce_recovered", "kl"))
    return _reconstruction_scores(entries, len(windows) * store.info.window_length) | no_model | match._asdict()


def _shards(
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


def _reconstruction_scores(entries: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    merged = Reconstruction()
    for entry in entries:
        merged.include(Reconstruction.from_json(entry["reconstruction"]))
    if merged.rows == 0:
        raise InputError("no held-out token is a row by the policy the SAE was trained with", "hold out more text")
    return {
        "l0": merged.l0,
        "fvu": merged.fvu,
        "dead_fraction": merged.dead_fraction,
        "rows": merged.rows,
        "tokens": tokens,
    }


def _taps(config: Config, saved: SavedSae, architecture: Architecture) -> Taps:
    """What is read and what is replaced: those of training, or for an autoencoder both ``config.tap``."""
    taps = Taps(saved.saex["tap"], saved.saex["target_tap"])
    if config.tap not in (None, taps.tap):
        if taps.tap != taps.target:
            raise InputError(
                f"evaluate.tap = {config.tap!r}: the transcoder reads {taps.tap} and predicts {taps.target}",
                "leave it unset",
            )
        taps = Taps(str(config.tap), str(config.tap))
    for tap, size in ((taps.tap, "d_in"), (taps.target, "d_out")):
        width, expected = tap_names.width(tap, architecture), saved.cfg.get(size, saved.cfg["d_in"])
        if width != expected:
            raise InputError(
                f"{tap} has width {width}, the SAE was trained on width {expected}", "give the model it was trained on"
            )
    return taps
