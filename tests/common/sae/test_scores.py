"""Every score against its definition in float64 NumPy."""

import math

import numpy as np
import pytest

from saex_pipe.common.sae.scores import Reconstruction, ce_recovered, match_dictionary, mean_max_cosine

ROWS, WIDTH, LATENTS = 1000, 8, 30


def batches(mean: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets about a mean far from 0, reconstructions, codes; float32, as they come."""
    rng = np.random.default_rng(0)
    target_BD = (mean + rng.normal(size=(ROWS, WIDTH)) * np.linspace(0.5, 2, WIDTH)).astype(np.float32)
    recon_BD = (target_BD + 0.3 * rng.normal(size=(ROWS, WIDTH))).astype(np.float32)
    codes_BF = np.maximum(rng.normal(size=(ROWS, LATENTS)) - 1, 0).astype(np.float32)
    codes_BF[:, [2, 5, 7]] = 0
    return target_BD, recon_BD, codes_BF


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("cuts", [[], [1, 400, 400, 999]], ids=["at once", "in batches"])
def test_reconstruction_scores_do_not_depend_on_the_batches(mean: float, cuts: list[int]) -> None:
    target_BD, recon_BD, codes_BF = batches(mean)
    scores = Reconstruction()
    for target, recon, codes in zip(*(np.split(a, cuts) for a in (target_BD, recon_BD, codes_BF)), strict=True):
        scores.add(target, recon, (codes > 0).sum(axis=1), (codes > 0).any(axis=0))
    exact_BD = target_BD.astype(np.float64)
    fvu = np.square(exact_BD - recon_BD).sum() / np.square(exact_BD - exact_BD.mean(axis=0)).sum()
    assert scores.rows == ROWS
    assert scores.fvu == pytest.approx(fvu, rel=1e-12)
    assert scores.l0 == pytest.approx((codes_BF > 0).sum() / ROWS, rel=1e-12)
    assert scores.dead_fraction == pytest.approx(3 / LATENTS, rel=1e-12)


def test_the_mean_itself_leaves_all_variance_unexplained() -> None:
    target_BD, _, _ = batches(5.0)
    scores = Reconstruction()
    scores.add(target_BD, target_BD.astype(np.float64).mean(axis=0) + 0 * target_BD, np.zeros(ROWS), np.zeros(3, bool))
    assert scores.fvu == pytest.approx(1.0, rel=1e-9)
    assert scores.dead_fraction == 1.0


def test_scores_of_nothing_are_nan() -> None:
    scores = Reconstruction()
    scores.add(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0, int), np.zeros(4, bool))
    assert all(math.isnan(value) for value in (scores.l0, scores.fvu, scores.dead_fraction))


@pytest.mark.parametrize(("ce_sae", "expected"), [(3.0, 1.0), (11.0, 0.0), (5.0, 0.75), (15.0, -0.5)])
def test_cross_entropy_recovered(ce_sae: float, expected: float) -> None:
    assert ce_recovered(ce_clean=3.0, ce_sae=ce_sae, ce_zero=11.0) == pytest.approx(expected)
    assert math.isnan(ce_recovered(ce_clean=3.0, ce_sae=ce_sae, ce_zero=3.0))


def test_match_with_the_true_dictionary() -> None:
    true_FD = np.eye(4)
    tilted = np.array([math.cos(0.3), math.sin(0.3), 0, 0])  # cosine 0.955 with the first, 0.296 with the second
    learned_GD = np.stack([5 * tilted, -np.eye(4)[1], 0.1 * np.eye(4)[2], np.zeros(4), np.eye(4)[2]])
    match = match_dictionary(true_FD, learned_GD)
    best_of_true = [math.cos(0.3), math.sin(0.3), 1.0, 0.0]
    best_of_learned = [math.cos(0.3), 0.0, 1.0, 0.0, 1.0]
    assert match.mean_max_cosine_true == pytest.approx(np.mean(best_of_true))
    assert match.mean_max_cosine_learned == pytest.approx(np.mean(best_of_learned))
    assert match.recovered_fraction == 0.5
    assert match_dictionary(true_FD, learned_GD, threshold=0.96).recovered_fraction == 0.25
    assert mean_max_cosine(learned_GD, true_FD) == match.mean_max_cosine_learned
