import json

import numpy as np
import pytest

from saex_pipe.common.formats.statistics import ActivationStatistics

ROWS = np.random.Generator(np.random.Philox(key=0)).normal(3, 2, (1000, 16)).astype(np.float32)


def test_sums_equal_numpy_in_float64():
    found = ActivationStatistics.of_rows(ROWS)
    exact = ROWS.astype(np.float64)
    assert found.count == 1000
    np.testing.assert_allclose(found.mean_D, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.sum_square_D, np.square(exact).sum(axis=0), rtol=1e-6)
    assert found.mean_square_norm == pytest.approx(np.square(exact).sum(axis=1).mean(), rel=1e-6)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_quantiles_are_right_to_a_bin(share):
    exact = np.quantile(np.linalg.norm(ROWS, axis=1), share)
    assert ActivationStatistics.of_rows(ROWS).norm_quantile(share) == pytest.approx(exact, rel=0.045)


def test_merging_parts_gives_the_whole():
    parts = [ActivationStatistics.of_rows(ROWS[a:b]) for a, b in ((0, 10), (10, 10), (10, 700), (700, 1000))]
    merged, whole = ActivationStatistics.merge(parts), ActivationStatistics.of_rows(ROWS)
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.sum_D, whole.sum_D, rtol=1e-13)
    np.testing.assert_allclose(merged.sum_square_D, whole.sum_square_D, rtol=1e-13)
    np.testing.assert_array_equal(merged.norm_histogram, whole.norm_histogram)


def test_json_keeps_every_bit():
    statistics = ActivationStatistics.of_rows(ROWS)
    found = ActivationStatistics.from_json(json.loads(json.dumps(statistics.to_json())))
    assert found.count == statistics.count
    for name in ("sum_D", "sum_square_D", "norm_histogram"):
        np.testing.assert_array_equal(getattr(found, name), getattr(statistics, name))


def test_no_rows_have_statistics_of_zero():
    empty = ActivationStatistics.of_rows(ROWS[:0])
    assert empty.count == 0
    assert empty.mean_square_norm == 0
    np.testing.assert_array_equal(empty.mean_D, np.zeros(16))
