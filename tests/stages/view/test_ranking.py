"""The ranking prefers what can be read, one property at a time."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from saex_pipe.common.formats.feature_cache import EXAMPLES_SCHEMA, FeatureCache
from saex_pipe.common.formats.folder import Folder
from saex_pipe.stages.view import ranking


def statistics(**changed: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Firing statistics of two latents: an ordinary one, and one that differs in what is given."""
    ordinary = {"count": 500.0, "rate": 0.002, "mean": 2.0, "largest": 10.0}
    count_F, rate_F, mean_F, max_F = (
        np.array([value, changed.get(name, value)], np.float32) for name, value in ordinary.items()
    )
    return count_F, rate_F, mean_F, max_F


def signals(**changed: float) -> ranking.ExampleSignals:
    ordinary = {"concentration_F": 0.5, "variety_F": 0.9, "agreement_F": 0.8}
    return ranking.ExampleSignals(*(np.array([value, changed.get(name, value)]) for name, value in ordinary.items()))


@pytest.mark.parametrize("worse", [{"count": 10}, {"rate": 0.1}, {"rate": 0.9}, {"mean": 8.0}])
def test_statistics_that_lower_the_interest(worse: dict[str, float]) -> None:
    good, bad = ranking.interest(*statistics(**worse), signals())
    assert 0 <= bad < good <= 1


@pytest.mark.parametrize("worse", ["concentration_F", "variety_F", "agreement_F"])
def test_examples_that_lower_the_interest(worse: str) -> None:
    good, bad = ranking.interest(*statistics(), signals(**{worse: 0.3}))
    assert 0 < bad < good


def test_dead_and_dense_latents_have_none() -> None:
    assert ranking.interest(*statistics(count=0, rate=0, mean=0, largest=0), signals())[1] == 0
    assert ranking.interest(*statistics(rate=0.3), signals())[1] == 0


def example_table(rows: list[tuple[int, str, int, list[float], list[str], int]]) -> pa.Table:
    """Rows of (feature, stratum, window, context activations, context tokens, offset of the peak)."""
    return pa.Table.from_pylist(
        [
            {
                "feature": feature,
                "stratum": stratum,
                "rank": 0,
                "window": window,
                "position": 40 + peak,
                "activation": activations[peak] if activations else 1.0,
                "context_start": 40,
                "context_activations": activations,
                "context_tokens": tokens,
            }
            for feature, stratum, window, activations, tokens, peak in rows
        ],
        EXAMPLES_SCHEMA,
    )


def test_signals_of_examples() -> None:
    tokens = ["the", " war", "War"]
    table = example_table(
        [
            (1, "top", 5, [0.0, 3.0, 0.0], tokens, 1),  # all on the peak
            (1, "top", 6, [2.0, 0.0, 2.0], tokens, 2),  # half of it; the same word in other letters
            (2, "top", 5, [1.0, 1.0, 0.0], tokens, 0),
            (2, "top", 5, [1.0, 1.0, 0.0], tokens, 1),  # the same window again, another word
            (2, "q1", 9, [0.0, 1.0, 0.0], tokens, 1),  # not among the strongest
            (4, "top", 7, [], [], 0),  # synthetic
        ]
    )
    one = ranking.example_signals([table], 5)
    two = ranking.example_signals([table.slice(0, 2), table.slice(2)], 5)
    assert one.concentration_F.tolist() == [0, 0.75, 0.5, 0, 1]
    assert one.variety_F.tolist() == [0, 1, 0.5, 0, 1]
    assert one.agreement_F == pytest.approx([0, 1, ranking.LOWEST_AGREEMENT, 0, 1])
    for whole, split in zip(one, two, strict=True):
        np.testing.assert_array_equal(whole, split)


def test_best_features_are_ordered_and_near_copies_wait() -> None:
    interest_F = np.array([0.2, 0.9, 0.8, -1.0, 0.2, 0.5])
    assert ranking.best_features(interest_F, {}, 3) == [1, 2, 5]
    assert ranking.best_features(interest_F, {}, 10) == [1, 2, 5, 0, 4]
    copies = {1: [2], 2: [1]}
    assert ranking.best_features(interest_F, copies, 3) == [1, 5, 0]
    assert ranking.best_features(interest_F, copies, 10) == [1, 5, 0, 4, 2]


def test_near_copies_hold_both_ways() -> None:
    nearest = pa.chunked_array([pa.array([[1, 2], [], [0]], pa.list_(pa.int32()))])
    cosines = pa.chunked_array([pa.array([[0.95, 0.3], [], [0.3]], pa.list_(pa.float32()))])
    assert ranking.near_copies(nearest, cosines) == {0: [1], 1: [0]}


@pytest.mark.parametrize("text", [True, False])
def test_rank_of_a_cache_leaves_out_dead_and_dense_latents(make_cache: Callable[..., Folder], text: bool) -> None:
    with FeatureCache(make_cache(text)) as cache:
        best = ranking.rank(cache, 50)
        assert len(set(best)) == 50
        assert not set(best) & {5, 7, 11, 200}
        assert ranking.rank(cache, 1000)[:50] == best
        assert set(ranking.rank(cache, 1000)) == set(range(240)) - {7, 11, 200}
