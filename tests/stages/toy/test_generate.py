"""The statistics of synthetic activations are the ones that were asked for."""

import numpy as np
import pytest
from scipy.stats import kstest, multivariate_normal, norm

from saex_pipe.stages.toy.generate import BLOCK_ROWS, FACTORS, firing_probabilities, generate_rows, make_truth

ROWS = 60 * BLOCK_ROWS
LATENTS, WIDTH, ACTIVE, DECAY, CORRELATION = 48, 16, 4.0, 0.96, 0.8


@pytest.fixture(scope="module")
def truth():
    return make_truth(LATENTS, WIDTH, ACTIVE, DECAY, CORRELATION, seed=3)


@pytest.fixture(scope="module")
def rows(truth):
    return generate_rows(truth, 0, ROWS, noise=0.0, seed=3)


def test_the_dictionary_has_unit_rows_in_all_directions(truth):
    assert truth.dictionary_FD.shape == (LATENTS, WIDTH)
    assert truth.dictionary_FD.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(truth.dictionary_FD, axis=1), 1.0, rtol=1e-6)
    many_FD = make_truth(20_000, 4, ACTIVE, 1.0, CORRELATION, seed=0).dictionary_FD
    second_moment_DD = many_FD.T @ many_FD / len(many_FD)
    np.testing.assert_allclose(second_moment_DD, np.eye(4) / 4, atol=0.01)
    np.testing.assert_allclose(many_FD.mean(axis=0), 0.0, atol=0.02)


def test_probabilities_fall_geometrically_and_add_up():
    probability_F = firing_probabilities(LATENTS, ACTIVE, DECAY)
    np.testing.assert_allclose(probability_F[1:] / probability_F[:-1], DECAY, rtol=1e-12)
    assert probability_F.sum() == pytest.approx(ACTIVE)
    np.testing.assert_allclose(firing_probabilities(10, 4.0, 1.0), 0.4)


def test_each_feature_fires_as_often_as_asked(truth, rows):
    fires_BF = rows.codes_BF > 0
    deviation_F = np.sqrt(truth.probability_F * (1 - truth.probability_F) / ROWS)
    scores_F = (fires_BF.mean(axis=0) - truth.probability_F) / deviation_F
    assert np.abs(scores_F).max() < 4.0  # standard deviations of the binomial
    assert 0.6 < scores_F.std() < 1.4
    assert fires_BF.sum(axis=1).mean() == pytest.approx(ACTIVE, rel=0.01)


def test_features_may_fire_always_or_never():
    decay = 1e-200
    truth = make_truth(3, WIDTH, 1.0, decay, CORRELATION, seed=0)
    np.testing.assert_array_equal(truth.probability_F, [1.0, decay, 0.0])
    fires_BF = generate_rows(truth, 0, 10, noise=0.0, seed=0).codes_BF > 0
    np.testing.assert_array_equal(fires_BF, np.tile([True, False, False], (10, 1)))


def test_magnitudes_are_uniform_and_independent_of_the_feature(rows):
    assert rows.codes_BF.min() == 0.0
    assert rows.codes_BF.max() <= 1.0
    for feature in (0, LATENTS - 1):
        magnitudes = rows.codes_BF[:, feature][rows.codes_BF[:, feature] > 0]
        assert kstest(magnitudes, "uniform").pvalue > 1e-3


def test_pairs_fire_together_as_the_gaussian_copula_says(truth, rows):
    correlation_FF = truth.correlation_FF()
    np.testing.assert_allclose(np.diag(correlation_FF), 1.0)
    assert np.linalg.eigvalsh(correlation_FF).min() > 0
    corner_FF = np.triu(correlation_FF[:12, :12], 1)
    extremes = (corner_FF.argmin(), corner_FF.argmax())  # among the features that fire most
    thresholds_F = norm.ppf(truth.probability_F)
    for i, j in (np.unravel_index(extreme, corner_FF.shape) for extreme in extremes):
        rho = correlation_FF[i, j]
        assert abs(rho) > 0.3
        together = multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf([thresholds_F[i], thresholds_F[j]])
        apart = truth.probability_F[i] * truth.probability_F[j]
        seen = np.mean((rows.codes_BF[:, i] > 0) & (rows.codes_BF[:, j] > 0))
        assert seen == pytest.approx(together, abs=4 * np.sqrt(together / ROWS))
        assert abs(seen - apart) > 8 * np.sqrt(apart / ROWS), "far from independent"


def test_the_strength_of_correlation_is_the_setting():
    free = make_truth(LATENTS, WIDTH, ACTIVE, DECAY, 0.0, seed=3)
    np.testing.assert_array_equal(free.correlation_FF(), np.eye(LATENTS))
    upper = np.triu_indices(400, 1)
    for strength in (0.3, 1.0):
        correlations = make_truth(400, WIDTH, ACTIVE, 1.0, strength, seed=3).correlation_FF()[upper]
        assert np.sqrt(np.mean(correlations**2)) == pytest.approx(strength / np.sqrt(FACTORS), rel=0.05)
        assert correlations.mean() == pytest.approx(0.0, abs=0.01 * strength)


def test_all_variance_may_be_common():
    truth = make_truth(LATENTS, WIDTH, ACTIVE, DECAY, 1.0, seed=3)
    rate_F = (generate_rows(truth, 0, ROWS, noise=0.0, seed=3).codes_BF > 0).mean(axis=0)
    np.testing.assert_allclose(rate_F, truth.probability_F, atol=4 * np.sqrt(0.25 / ROWS))


def test_activations_are_codes_times_dictionary_plus_noise(truth, rows):
    assert rows.acts_BD.dtype == rows.codes_BF.dtype == np.float32
    np.testing.assert_allclose(rows.acts_BD, rows.codes_BF @ truth.dictionary_FD, atol=1e-6)
    noisy = generate_rows(truth, 0, ROWS, noise=0.25, seed=3)
    np.testing.assert_array_equal(noisy.codes_BF, rows.codes_BF)
    noise_BD = noisy.acts_BD - rows.acts_BD
    assert noise_BD.std() == pytest.approx(0.25, rel=0.01)
    assert kstest(noise_BD[:1000].ravel() / 0.25, "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (100, 100), (BLOCK_ROWS - 1, 2), (BLOCK_ROWS, BLOCK_ROWS), (7, 3 * BLOCK_ROWS)]
)
def test_rows_do_not_depend_on_how_they_are_cut(truth, start, count):
    whole = generate_rows(truth, 0, 4 * BLOCK_ROWS, noise=0.1, seed=3)
    part = generate_rows(truth, start, count, noise=0.1, seed=3)
    np.testing.assert_array_equal(part.acts_BD, whole.acts_BD[start : start + count])
    np.testing.assert_array_equal(part.codes_BF, whole.codes_BF[start : start + count])


def test_blocks_and_seeds_differ(truth):
    first = generate_rows(truth, 0, BLOCK_ROWS, noise=0.0, seed=3)
    second = generate_rows(truth, BLOCK_ROWS, BLOCK_ROWS, noise=0.0, seed=3)
    other = generate_rows(truth, 0, BLOCK_ROWS, noise=0.0, seed=4)
    for rows in (second, other):
        assert abs(np.corrcoef(first.codes_BF.ravel(), rows.codes_BF.ravel())[0, 1]) < 0.1
    changed = make_truth(LATENTS, WIDTH, ACTIVE, DECAY, CORRELATION, seed=4)
    assert abs(np.sum(changed.dictionary_FD * truth.dictionary_FD)) / LATENTS < 0.2
    again = make_truth(LATENTS, WIDTH, ACTIVE, DECAY, CORRELATION, seed=3)
    np.testing.assert_array_equal(again.dictionary_FD, truth.dictionary_FD)
    np.testing.assert_array_equal(again.factor_FR, truth.factor_FR)
