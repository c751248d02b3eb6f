"""Scores of an SAE on rows it was never trained on."""

import json
import math
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
from saex_pipe.common.preemption import StopRequest, graceful_stop
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.saelens import from_saelens
from saex_pipe.common.sae.scores import Reconstruction, ce_recovered, match_dictionary
from saex_pipe.stages.evaluate.config import Config
from saex_pipe.stages.evaluate.crosscoder import Subject, crosscoder_scores, require_taps
from saex_pipe.stages.evaluate.held_out import NOT_SPLICED, batches, reconstruction_scores, shards
from saex_pipe.stages.evaluate.splice import Sums, add_batch, keep_rows, make_scorer


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
    sae, policy = _sae(saved, config), RowPolicy.from_json(saved.saex["row_policy"])
    if len(saved.taps) > 1:
        require_taps(config, saved, model.architecture)
        return crosscoder_scores(config, output, Subject(model, sae, saved.taps, policy, corpus), windows, stop)
    taps = _taps(config, saved, model.architecture)
    base = resume_place(taps, model.architecture)
    capture = make_capture([*([] if base is None else [base]), *taps, *(policy.norm_limits or {})])
    score = make_scorer(taps, base)

    for bar, number, shard in shards(config, output, windows, corpus.info.window_length, stop):
        sums = Sums({}, 0, Reconstruction())
        for windows_of_batch, tokens_NL, padding_NL in batches(config, corpus, shard):
            found = capture(model, jnp.asarray(tokens_NL))
            keep_NL = keep_rows(policy, tokens_NL, padding_NL, found)
            scores = score(model, sae, tokens_NL, found, keep_NL)
            sums = add_batch(sums, scores, keep_NL, padding_NL)
            bar.advance(windows_of_batch * corpus.info.window_length)
        entry = {"nats": sums.nats, "predicted": sums.predicted, "reconstruction": sums.reconstruction.to_json()}
        output.commit_shard(number, entry)

    entries = [entry for _, entry in sorted(output.ledger().items())]
    predicted = sum(entry["predicted"] for entry in entries)
    if predicted == 0:
        raise InputError(
            f"no token of the {len(windows)} held-out windows is predicted by another", "give longer documents"
        )
    nats = {name: sum(entry["nats"][name] for entry in entries) / predicted for name in entries[0]["nats"]}
    return reconstruction_scores(entries, len(windows) * corpus.info.window_length) | {
        "ce_clean": nats["clean"],
        "ce_sae": nats["sae"],
        "ce_zero": nats["zero"],
        "ce_recovered": ce_recovered(nats["clean"], nats["sae"], nats["zero"]),
        "kl": nats["kl"],
    }


def _on_toy(config: Config, output: StageOutput, saved: SavedSae, stop: StopRequest) -> dict[str, Any]:
    """Reconstruction of held-out rows, and the match of the decoder with the true dictionary."""
    assert config.store is not None
    if len(saved.taps) > 1:
        raise InputError("a toy store has one tap, a crosscoder several", "score it on evaluate.model and tokens")
    tap = saved.saex["tap"]
    store = ActivationStore(config.store, (tap,))
    windows = range(store.info.train_windows, store.info.windows)
    windows = windows[: config.max_tokens // store.info.window_length]
    dictionary_FD = read_dictionary(config.store)
    if not windows:
        raise InputError(f"{config.store} has no held-out windows", "raise toy.holdout_fraction or evaluate.max_tokens")
    sae = _sae(saved, config)
    for bar, number, shard in shards(config, output, windows, store.info.window_length, stop):
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
    return reconstruction_scores(entries, len(windows) * store.info.window_length) | NOT_SPLICED | match._asdict()


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
