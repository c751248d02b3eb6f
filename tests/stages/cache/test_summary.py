"""Feature statistics against a plain count over dense codes, and merging in any order."""

import itertools
from functools import reduce

import numpy as np
import pytest

from saex_pipe.stages.cache.summary import BIN_EDGES, Codes, merge, summarise

LATENTS, LENGTH, EXAMPLES, K = 12, 5, 3, 4


def make_codes(first_window, windows, seed):
    random = np.random.default_rng(seed)
    keys = first_window * LENGTH + np.sort(random.choice(windows * LENGTH, windows * LENGTH - 7, replace=False))
    latents = np.stack([random.choice(LATENTS - 1, K, replace=False) for _ in keys]).astype(np.int32)
    values = np.maximum(random.normal(0.5, 1, latents.shape), 0).astype(np.float32)
    return Codes(keys.astype(np.int64), values, latents)


PARTS = [make_codes(0, 9, 0), make_codes(9, 6, 1), make_codes(15, 11, 2)]


def dense(codes):
    codes_BF = np.zeros((len(codes.keys_B), LATENTS), np.float32)
    np.put_along_axis(codes_BF, codes.latents_BK, codes.values_BK, axis=1)
    return codes_BF


@pytest.fixture(scope="module")
def summary():
    return reduce(merge, [summarise(codes, LATENTS, LENGTH, EXAMPLES) for codes in PARTS])


def test_counts_sums_maxima_and_histograms(summary):
    codes_BF = np.concatenate([dense(codes) for codes in PARTS])
    assert summary.rows == len(codes_BF)
    np.testing.assert_array_equal(summary.count_F, (codes_BF > 0).sum(0))
    np.testing.assert_array_equal(summary.max_F, codes_BF.max(0))
    active = np.maximum((codes_BF > 0).sum(0), 1)
    np.testing.assert_allclose(summary.mean_F, codes_BF.astype(np.float64).sum(0) / active, atol=2.0**-17)
    for feature in range(LATENTS):
        values = codes_BF[:, feature]
        expected, _ = np.histogram(values[values > 0], BIN_EDGES)
        np.testing.assert_array_equal(summary.histogram_FJ[feature], expected)


def test_the_strongest_windows_are_found_and_no_window_twice(summary):
    codes_BF = np.concatenate([dense(codes) for codes in PARTS])
    keys = np.concatenate([codes.keys_B for codes in PARTS])
    for feature in range(LATENTS):
        best = {}
        for key, value in zip(keys, codes_BF[:, feature], strict=True):
            if value > best.get(key // LENGTH, (0, 0))[0]:
                best[key // LENGTH] = (value, key)
        expected = sorted(best.values(), key=lambda pair: (-pair[0], pair[1]))[:EXAMPLES]
        found = [(v, k) for v, k in zip(*summary.strongest[::-1], strict=True)][feature]
        pairs = [(value, key) for value, key in zip(found[0], found[1], strict=True) if key >= 0]
        assert pairs == expected


def test_the_sample_is_of_windows_in_which_the_feature_fires(summary):
    for feature in range(LATENTS):
        keys = summary.sample.keys_FE[feature]
        assert len(set(keys[keys >= 0] // LENGTH)) == (keys >= 0).sum()
        assert (summary.sample.values_FE[feature][keys >= 0] > 0).all()
    assert (summary.sample.keys_FE[LATENTS - 1] == -1).all(), "this latent never fires"


def test_the_sample_is_not_the_strongest_and_covers_all_windows():
    """Over many features with equal codes, every window is drawn about as often."""
    windows, latents = 20, 400
    keys = np.arange(windows, dtype=np.int64) * LENGTH
    values = np.tile(np.arange(1, windows + 1, dtype=np.float32)[:, None], (1, latents))
    codes = Codes(keys, values, np.tile(np.arange(latents, dtype=np.int32), (windows, 1)))
    drawn = summarise(codes, latents, LENGTH, 4).sample.keys_FE.ravel() // LENGTH
    counts = np.bincount(drawn, minlength=windows)
    assert counts.sum() == 4 * latents
    assert abs(counts - 80).max() < 5 * np.sqrt(80)


def test_merging_in_any_order_and_grouping_gives_the_same_bits():
    parts = [summarise(codes, LATENTS, LENGTH, EXAMPLES) for codes in PARTS]
    results = [reduce(merge, order) for order in itertools.permutations(parts)]
    results.append(merge(parts[0], merge(parts[1], parts[2])))
    flat = [
        np.concatenate([np.ravel(a).astype(np.float64) for a in (*r[:5], *r.strongest, *r.sample)]) for r in results
    ]
    for other in flat[1:]:
        np.testing.assert_array_equal(flat[0], other)
