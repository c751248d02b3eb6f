"""Which features are worth looking at first.

``interest`` multiplies what makes a feature readable, each factor in [0, 1]:

- evidence: it fired often enough to be judged, 30 times for full marks;
- sparsity: full marks up to 1 % of the rows, none from 20 %, linear in the logarithm between;
- and the geometric mean of four properties of its strongest examples ("top" stratum):
  contrast       1 - mean / max activation: strong firing stands out from weak;
  concentration  the share of a context's activation that falls on the peak token;
  variety        distinct windows per example: not one passage over and over;
  agreement      the peak tokens resemble each other: 1 when all are the same word, 0.3 when all differ
                 (a floor, since features of meaning rather than of one word are wanted too).

``best_features`` then takes them in that order, leaving near copies of a taken one to the end.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saex_pipe.common.formats.feature_cache import TOP_STRATUM, FeatureCache

FULL_EVIDENCE_ROWS = 30
SPARSE_FRACTION, DENSE_FRACTION = 0.01, 0.2
LOWEST_AGREEMENT = 0.3
COPY_COSINE = 0.9


class ExampleSignals(NamedTuple):
    """Properties of the strongest examples by latent, each in [0, 1]; 0 where there are no examples."""

    concentration_F: np.ndarray
    variety_F: np.ndarray
    agreement_F: np.ndarray


def rank(cache: FeatureCache, count: int) -> list[int]:
    """The ``count`` best features of a cache, best first; fewer when fewer fire."""
    wanted = ["firing_count", "firing_rate", "mean_activation", "max_activation", "nearest_features", "nearest_cosines"]
    table = cache.features(wanted)
    count_F, rate_F, mean_F, max_F = (table.column(name).to_numpy() for name in wanted[:4])
    columns = ["feature", "stratum", "window", "position", "activation", "context_start"]
    examples = cache.iter_examples([*columns, "context_activations", "context_tokens"])
    interest_F = interest(count_F, rate_F, mean_F, max_F, example_signals(examples, len(cache)))
    copies = near_copies(table.column("nearest_features"), table.column("nearest_cosines"))
    return best_features(np.where(count_F > 0, interest_F, -1.0), copies, count)


def interest(
    count_F: np.ndarray, rate_F: np.ndarray, mean_F: np.ndarray, max_F: np.ndarray, signals: ExampleSignals
) -> np.ndarray:
    """The interest of every latent, float64 in [0, 1], from its firing statistics and its examples; see the module."""
    evidence_F = np.minimum(1.0, count_F / FULL_EVIDENCE_ROWS)
    log_rate_F = np.log10(np.maximum(rate_F.astype(np.float64), 1e-12))
    span = np.log10(DENSE_FRACTION) - np.log10(SPARSE_FRACTION)
    sparsity_F = np.clip((np.log10(DENSE_FRACTION) - log_rate_F) / span, 0.0, 1.0)
    contrast_F = 1.0 - np.divide(mean_F, max_F, out=np.ones(len(max_F)), where=max_F > 0)
    product_F = np.clip(contrast_F, 0.0, 1.0) * signals.concentration_F * signals.variety_F * signals.agreement_F
    return np.asarray(evidence_F * sparsity_F * product_F**0.25)


def best_features(interest_F: np.ndarray, copies: dict[int, list[int]], count: int) -> list[int]:
    """Indices of the ``count`` most interesting latents, best first; those of negative interest never.

    ``copies[i]`` are the latents that point almost where ``i`` does: after ``i`` they wait until no other is left.
    Ties go to the lower index.
    """
    order = [int(i) for i in np.argsort(-interest_F, kind="stable") if interest_F[i] >= 0]
    taken: list[int] = []
    waiting: list[int] = []
    passed_over: set[int] = set()
    for feature in order:
        if feature in passed_over:
            waiting.append(feature)
            continue
        taken.append(feature)
        passed_over.update(copies.get(feature, ()))
        if len(taken) == count:
            break
    return (taken + waiting)[:count]


def near_copies(nearest: pa.ChunkedArray, cosines: pa.ChunkedArray) -> dict[int, list[int]]:
    """For each latent its neighbours whose decoder directions have a cosine of COPY_COSINE or more, both ways."""
    copies: dict[int, list[int]] = {}
    owner = pc.list_parent_indices(nearest).to_numpy()
    close = pc.list_flatten(cosines).to_numpy() >= COPY_COSINE
    for one, other in zip(owner[close].tolist(), pc.list_flatten(nearest).to_numpy()[close].tolist(), strict=True):
        copies.setdefault(one, []).append(other)
        copies.setdefault(other, []).append(one)
    return copies


def example_signals(tables: Iterable[pa.Table], latents: int) -> ExampleSignals:
    """The signals of ``latents`` latents from tables of examples, no feature cut between two tables."""
    signals = ExampleSignals(*(np.zeros(latents) for _ in ExampleSignals._fields))
    for table in tables:
        top = table.filter(pc.equal(table.column("stratum"), TOP_STRATUM)).combine_chunks()
        if not len(top):
            continue
        feature_E = top.column("feature").to_numpy()
        examples_F = np.bincount(feature_E, minlength=latents)
        has = examples_F > 0
        concentration_F = np.bincount(feature_E, _concentration(top), latents)
        pairs = np.unique(np.stack([feature_E, top.column("window").to_numpy()]), axis=1)
        windows_F = np.bincount(pairs[0], minlength=latents)
        signals.concentration_F[has] = concentration_F[has] / examples_F[has]
        signals.variety_F[has] = windows_F[has] / examples_F[has]
        signals.agreement_F[has] = _agreement(feature_E, _peak_words(top), examples_F)[has]
    return signals


def _concentration(top: pa.Table) -> np.ndarray:
    """By example, the activation of the peak token as a share of its whole context; 1 without a context."""
    lists = top.column("context_activations")
    lengths_E = pc.list_value_length(lists).to_numpy()
    owner = np.repeat(np.arange(len(top)), lengths_E)
    mass_E = np.bincount(owner, np.maximum(pc.list_flatten(lists).to_numpy(), 0.0), len(top))
    peak_E = top.column("activation").to_numpy().astype(np.float64)
    return np.clip(np.divide(peak_E, mass_E, out=np.ones(len(top)), where=mass_E > 0), 0.0, 1.0)


def _peak_words(top: pa.Table) -> np.ndarray:
    """By example, a number for the word at the peak, the same for " War" and "war"; -1 without text."""
    lists = top.column("context_tokens")
    lengths_E = pc.list_value_length(lists).to_numpy()
    words = pc.utf8_lower(pc.utf8_trim_whitespace(pc.list_flatten(lists))).combine_chunks()
    offset_E = top.column("position").to_numpy() - top.column("context_start").to_numpy()
    inside_E = (offset_E >= 0) & (offset_E < lengths_E)
    at_E = (np.cumsum(lengths_E) - lengths_E + offset_E)[inside_E]
    word_E = np.full(len(top), -1)
    word_E[inside_E] = words.take(pa.array(at_E)).dictionary_encode().indices.to_numpy()
    return word_E


def _agreement(feature_E: np.ndarray, word_E: np.ndarray, examples_F: np.ndarray) -> np.ndarray:
    """By latent, 1 minus the entropy of its peak words over the largest it could be, above LOWEST_AGREEMENT."""
    pairs, counts = np.unique(np.stack([feature_E, word_E]), axis=1, return_counts=True)
    share = counts / examples_F[pairs[0]]
    entropy_F = np.bincount(pairs[0], -share * np.log(share), len(examples_F))
    largest_F = np.log(np.maximum(examples_F, 2))
    return LOWEST_AGREEMENT + (1.0 - LOWEST_AGREEMENT) * (1.0 - entropy_F / largest_F)
