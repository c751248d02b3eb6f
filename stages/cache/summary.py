"""Statistics and examples of every feature, gathered a shard at a time and merged in any order.

Merging gives the same bits in whatever order and grouping: counts are integers, sums are fixed-point integers,
and the choice of examples is by a total order.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt64

_FRACTION_BITS = 16  # of the fixed-point sums: activations are rounded to 2^-16
_BINS_PER_OCTAVE = 2
_LOWEST_OCTAVE = -12
BINS = 80  # positive activations from 2^-12 to 2^28
BIN_EDGES = 2.0 ** (np.arange(BINS + 1) / _BINS_PER_OCTAVE + _LOWEST_OCTAVE)
_NONE = -1


class Codes(NamedTuple):
    """The active latents of the rows of one shard, K a row; a value of 0 is padding."""

    keys_B: Int64[np.ndarray, " B"]  # window * window length + position of the row's token
    values_BK: Float32[np.ndarray, "B K"]
    latents_BK: Int32[np.ndarray, "B K"]


class Examples(NamedTuple):
    """Up to E windows of each feature, best first; key -1 where there are fewer."""

    keys_FE: Int64[np.ndarray, "F E"]
    values_FE: Float32[np.ndarray, "F E"]


class Summary(NamedTuple):
    """What some shards say about every feature."""

    rows: int
    count_F: Int64[np.ndarray, " F"]  # rows on which the feature fires
    sum_F: Int64[np.ndarray, " F"]  # of its activations, in units of 2^-16
    max_F: Float32[np.ndarray, " F"]
    histogram_FJ: Int64[np.ndarray, "F J"]  # rows by activation, between BIN_EDGES
    strongest: Examples  # by activation
    sample: Examples  # by a hash of feature and place: a uniform sample of the windows in which it fires

    @property
    def mean_F(self) -> np.ndarray:
        """Mean activation over the rows where a feature fires, 0 where it never does."""
        return self.sum_F / 2.0**_FRACTION_BITS / np.maximum(self.count_F, 1)


def summarise(codes: Codes, latents: int, window_length: int, examples: int) -> Summary:
    """The summary of one shard; a window counts as an example at its strongest token only."""
    fires = codes.values_BK > 0
    feature, value = codes.latents_BK[fires].astype(np.int64), codes.values_BK[fires]
    key = np.broadcast_to(codes.keys_B[:, None], fires.shape)[fires]
    max_F = np.zeros(latents, np.float32)
    np.maximum.at(max_F, feature, value)
    octave = np.log2(np.maximum(value, BIN_EDGES[0])) - _LOWEST_OCTAVE
    bin_index = np.clip((octave * _BINS_PER_OCTAVE).astype(np.int64), 0, BINS - 1)
    fixed = np.rint(value.astype(np.float64) * 2.0**_FRACTION_BITS).astype(np.int64)
    sum_F = np.zeros(latents, np.int64)
    np.add.at(sum_F, feature, fixed)

    by_window = np.lexsort((key, -value, key // window_length, feature))
    feature, value, key = feature[by_window], value[by_window], key[by_window]
    first = np.ones(len(feature), bool)
    first[1:] = (np.diff(feature) != 0) | (np.diff(key // window_length) != 0)
    feature, value, key = feature[first], value[first], key[first]
    return Summary(
        rows=len(codes.keys_B),
        count_F=np.bincount(codes.latents_BK[fires], minlength=latents).astype(np.int64),
        sum_F=sum_F,
        max_F=max_F,
        histogram_FJ=np.bincount(codes.latents_BK[fires].astype(np.int64) * BINS + bin_index, minlength=latents * BINS)
        .reshape(latents, BINS)
        .astype(np.int64),
        strongest=_first_of_each(feature, value, key, np.lexsort((key, -value, feature)), latents, examples),
        sample=_first_of_each(feature, value, key, np.lexsort((_hash(feature, key), feature)), latents, examples),
    )


def merge(a: Summary, b: Summary) -> Summary:
    """The summary of the shards of both."""
    return Summary(
        rows=a.rows + b.rows,
        count_F=a.count_F + b.count_F,
        sum_F=a.sum_F + b.sum_F,
        max_F=np.maximum(a.max_F, b.max_F),
        histogram_FJ=a.histogram_FJ + b.histogram_FJ,
        strongest=_merge_examples(a.strongest, b.strongest, by_hash=False),
        sample=_merge_examples(a.sample, b.sample, by_hash=True),
    )


def _first_of_each(
    feature: np.ndarray, value: np.ndarray, key: np.ndarray, order: np.ndarray, latents: int, examples: int
) -> Examples:
    """The first ``examples`` entries of each feature in ``order``, which sorts by feature before all else."""
    feature, value, key = feature[order], value[order], key[order]
    starts_F = np.searchsorted(feature, np.arange(latents))
    rank = np.arange(len(feature)) - starts_F[feature]
    taken = rank < examples
    found = Examples(np.full((latents, examples), _NONE, np.int64), np.zeros((latents, examples), np.float32))
    found.keys_FE[feature[taken], rank[taken]] = key[taken]
    found.values_FE[feature[taken], rank[taken]] = value[taken]
    return found


def _merge_examples(a: Examples, b: Examples, *, by_hash: bool) -> Examples:
    keys, values = np.concatenate([a.keys_FE, b.keys_FE], 1), np.concatenate([a.values_FE, b.values_FE], 1)
    missing = keys == _NONE
    if by_hash:
        feature_F1 = np.arange(len(keys))[:, None]
        order = np.lexsort((_hash(np.broadcast_to(feature_F1, keys.shape), keys), missing), axis=1)
    else:
        order = np.lexsort((keys, -values, missing), axis=1)
    order = order[:, : a.keys_FE.shape[1]]
    return Examples(np.take_along_axis(keys, order, 1), np.take_along_axis(values, order, 1))


def _hash(feature: np.ndarray, key: np.ndarray) -> UInt64[np.ndarray, "..."]:
    """splitmix64 (Steele, Lea and Flood 2014) of feature and place."""
    with np.errstate(over="ignore"):
        x = key.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * (feature.astype(np.uint64) + np.uint64(1))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
