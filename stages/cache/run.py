"""Activation store and SAE to the feature cache."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from saex_pipe.common import resources
from saex_pipe.common.beam import for_each, run_pipeline
from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.checkpoint import SavedSae, read_sae
from saex_pipe.common.formats.feature_cache import TOP_STRATUM, CacheSource, write_examples, write_features
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.stage_output import StageOutput, stage_output
from saex_pipe.common.llm.tokenizer import Tokenizer, load_tokenizer
from saex_pipe.common.metrics_log import watched_progress
from saex_pipe.common.preemption import graceful_stop
from saex_pipe.stages.cache.beam import summarise_shards
from saex_pipe.stages.cache.config import Config
from saex_pipe.stages.cache.directions import OutputTokens, nearest_rows, output_tokens
from saex_pipe.stages.cache.summary import BIN_EDGES, Summary
from saex_pipe.stages.cache.work import (
    PARTS,
    CacheWork,
    codes_name,
    contexts_name,
    has_summary,
    read_summary,
)

_QUANTILES = 4
_FEATURES_AT_ONCE = 1024


def run(config: Config, *, force: bool = False) -> Manifest:
    """Write the feature cache at ``config.out``."""
    with stage_output(config, force=force) as output, graceful_stop(at_once=True):
        if output.manifest is not None:
            return output.manifest
        saved = read_sae(config.sae)
        store = ActivationStore(config.store, saved.taps)
        windows = store.info.windows
        if config.max_tokens is not None:
            windows = min(windows, max(1, config.max_tokens // store.info.window_length))
        work = CacheWork(
            config.store,
            config.sae,
            output.folder.uri,
            output.digest,
            windows,
            config.examples_per_feature,
            config.context,
        )
        shards = range(len(store.info.tiling.shards(windows)))
        _summarise(config, output, work, shards)
        _look_up_contexts(config, output, work, shards)
        summary = read_summary(output.folder.uri, output.digest)
        tokenizer = _tokenizer(store)
        size = _write_features(config, output, store, saved, summary, tokenizer)
        size += write_examples(output.folder, _examples(output, summary, shards, store.info.window_length, tokenizer))
        output.folder.delete(PARTS)
        tokens = windows * store.info.window_length
        contents = {"tap": _name(saved), "latents": len(summary.count_F), "rows": summary.rows}
        return output.finish(contents=contents, totals={"tokens": tokens, "rows": summary.rows, "bytes": size})


def _summarise(config: Config, output: StageOutput, work: CacheWork, shards: range) -> None:
    if has_summary(output.folder):
        return
    names = [codes_name(shard) for shard in shards]
    with watched_progress("encoding", names, "shards", output.folder.list, PARTS, output.metrics):
        pipeline = summarise_shards(shards, work.summarise, work.write_summary)
        run_pipeline(pipeline, config.runner, config.runner_options)


def _look_up_contexts(config: Config, output: StageOutput, work: CacheWork, shards: range) -> None:
    names = [contexts_name(shard) for shard in shards]
    present = {*output.folder.list(PARTS)}
    missing = [shard for shard, name in zip(shards, names, strict=True) if name not in present]
    with watched_progress("looking up examples", names, "shards", output.folder.list, PARTS, output.metrics):
        run_pipeline(for_each(missing, work.write_contexts), config.runner, config.runner_options)


def _tokenizer(store: ActivationStore) -> Tokenizer | None:
    """The tokenizer of the store's text, None for synthetic activations."""
    recorded = store.info.source.get("tokenizer")
    if recorded is None:
        return None
    tokenizer = load_tokenizer(resources.fetch(recorded["uri"]))
    if tokenizer.digest != recorded["digest"]:
        raise InputError(
            f"the tokenizer at {recorded['uri']} is not the one that {store.uri} was made with",
            "put that one back there",
        )
    return tokenizer


def _write_features(
    config: Config,
    output: StageOutput,
    store: ActivationStore,
    saved: SavedSae,
    summary: Summary,
    tokenizer: Tokenizer | None,
) -> int:
    model = store.info.source.get("model")
    w_dec_FD = saved.tensors["W_dec"]
    effects = OutputTokens.none(len(w_dec_FD))
    residual = len(saved.target_taps) == 1 and _is_residual(saved.target_taps[0])
    if model is not None and tokenizer is not None and config.output_tokens and residual:
        effects = output_tokens(resources.fetch(model), w_dec_FD, config.output_tokens, tokenizer)
    nearest_FN, cosines_FN = nearest_rows(w_dec_FD, min(config.nearest, len(w_dec_FD) - 1))
    counts, edges = _histograms(summary)
    columns: dict[str, Any] = {
        "feature": np.arange(len(w_dec_FD), dtype=np.int32),
        "firing_count": summary.count_F,
        "firing_rate": (summary.count_F / max(summary.rows, 1)).astype(np.float32),
        "mean_activation": summary.mean_F.astype(np.float32),
        "max_activation": summary.max_F,
        "histogram": counts,
        "histogram_edges": edges,
        "top_output_tokens": effects.top_tokens,
        "top_output_effects": effects.top_effects,
        "bottom_output_tokens": effects.bottom_tokens,
        "bottom_output_effects": effects.bottom_effects,
        "nearest_features": nearest_FN,
        "nearest_cosines": cosines_FN,
    }
    variant = f"{saved.saex['config']['variant']} with {len(w_dec_FD):,} latents"
    return write_features(output.folder, columns, CacheSource(model or "", _name(saved), variant, summary.rows))


def _name(saved: SavedSae) -> str:
    """Of what is read."""
    return " + ".join(saved.taps)


def _is_residual(tap: str) -> bool:
    """Whether what is written at ``tap`` is added to the residual stream, and so reaches the logits directly."""
    return tap == "embed" or tap.rpartition(".")[2] in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def _histograms(summary: Summary) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Counts and edges of each feature, from its lowest to its highest bin that is not empty."""
    counts, edges = [], []
    for histogram_J in summary.histogram_FJ:
        filled = np.flatnonzero(histogram_J)
        part = slice(filled[0], filled[-1] + 1) if len(filled) else slice(0, 0)
        counts.append(histogram_J[part])
        edges.append(BIN_EDGES[part.start : part.stop + 1].astype(np.float32))
    return counts, edges


def _examples(
    output: StageOutput, summary: Summary, shards: range, window_length: int, tokenizer: Tokenizer | None
) -> Iterator[dict[str, Any]]:
    """The columns of ``examples.parquet``, for a range of features at a time."""
    parts = [arrays for shard in shards if (arrays := output.folder.read_arrays(contexts_name(shard))) is not None]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    place = found["feature"] * (int(found["key"].max(initial=0)) + 1) + found["key"]
    order = np.argsort(place)
    radius = found["tokens"].shape[1] // 2
    texts = {-1: ""} | {int(i): tokenizer.token_text(i) for i in np.unique(found["tokens"]) if tokenizer and i >= 0}
    for start in range(0, len(summary.count_F), _FEATURES_AT_ONCE):
        feature, stratum, rank, key, value = _strata(summary, start)
        at = order[np.searchsorted(place[order], feature * (int(found["key"].max(initial=0)) + 1) + key)]
        position = key % window_length
        first = np.maximum(position - radius, 0)
        skip, stop = first - position + radius, np.minimum(radius + window_length - position, 2 * radius + 1)
        acts, tokens = found["activations"][at], found["tokens"][at]
        yield {
            "feature": feature.astype(np.int32),
            "stratum": stratum,
            "rank": rank.astype(np.int32),
            "window": key // window_length,
            "position": position.astype(np.int32),
            "activation": value,
            "context_start": first.astype(np.int32),
            "context_activations": [row[a:b] for row, a, b in zip(acts, skip, stop, strict=True)],
            "context_tokens": [
                [texts[int(token)] for token in row[a:b]] if tokenizer else []
                for row, a, b in zip(tokens, skip, stop, strict=True)
            ],
        }


def _strata(summary: Summary, start: int) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Feature, stratum, rank, key and value of the examples of the features from ``start`` on.

    The strongest form one stratum; the rest of the uniform sample is cut into quarters by activation.
    """
    rows: list[tuple[int, str, int, int, float]] = []
    for feature in range(start, min(start + _FEATURES_AT_ONCE, len(summary.count_F))):
        keys_E, values_E = summary.strongest.keys_FE[feature], summary.strongest.values_FE[feature]
        strongest = {int(key) for key in keys_E if key >= 0}
        rows += [(feature, TOP_STRATUM, i, int(keys_E[i]), values_E[i]) for i in range(len(strongest))]
        sample = zip(summary.sample.values_FE[feature], summary.sample.keys_FE[feature], strict=True)
        rest = sorted((-float(value), int(key)) for value, key in sample if key >= 0 and int(key) not in strongest)
        for quarter, members in enumerate(np.array_split(np.arange(len(rest)), _QUANTILES)):
            name = f"q{_QUANTILES - quarter}"
            rows += [(feature, name, i, rest[m][1], -rest[m][0]) for i, m in enumerate(members)]
    feature_E, stratum, rank_E, key_E, value_E = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    ints = [np.asarray(column, np.int64) for column in (feature_E, rank_E, key_E)]
    return ints[0], list(stratum), ints[1], ints[2], np.asarray(value_E, np.float32)
