import json

import ml_dtypes
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


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_only_rows_to_keep_count(dtype):
    rows_NLD = (ROWS.reshape(50, 20, 16) * np.linspace(0.01, 100, 16, dtype=np.float32)).astype(dtype)
    keep_NL = np.random.Generator(np.random.Philox(key=5)).random((50, 20)) < 0.8
    rows_NLD[0, 0], keep_NL[0, 0] = np.inf, False
    found, exact = ActivationStatistics.of_rows(rows_NLD, keep_NL), rows_NLD[keep_NL].astype(np.float64)
    assert found.count == keep_NL.sum()
    np.testing.assert_allclose(found.sum_D, exact.sum(axis=0), rtol=1e-12 if dtype == np.float32 else 1e-6)
    np.testing.assert_allclose(found.sum_square_D, np.square(exact).sum(axis=0), rtol=1e-6)
    assert found.norm_histogram.sum() == found.count
    np.testing.assert_allclose(found.variance_D, exact.var(axis=0), rtol=1e-4)


def test_the_ratio_of_mean_to_spread():
    exact = ROWS.astype(np.float64)
    expected = np.linalg.norm(exact.mean(axis=0)) / np.sqrt(exact.var(axis=0).sum())
    assert ActivationStatistics.of_rows(ROWS).mean_to_spread == pytest.approx(expected, rel=1e-6)
    assert ActivationStatistics.of_rows(np.ones((3, 2), np.float32)).mean_to_spread == 0


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
