"""Synthetic activations that are sparse combinations of a known dictionary.

L. Sharkey, D. Braun, B. Millidge, "Taking features out of superposition with sparse autoencoders", 2022,
https://www.lesswrong.com/posts/z6QQJbtpkEAX3Aojj

A row is ``x_D = codes_F @ dictionary_FD + noise``. Feature i fires with probability ``p_i = p_0 decay^i``, and which
features fire together follows a Gaussian copula: correlated standard normals ``z_F`` become uniforms ``Phi(z_i)``, and
feature i fires where its uniform is below ``p_i``. A feature that fires has a magnitude uniform in (0, 1].

The covariance has a low-rank random factor, ``z = g @ factor.T + sqrt(1 - |factor_i|^2) e``, so its cost grows with the
number of features and not with its square, while every ``z_i`` is exactly standard normal: the ``p_i`` hold exactly.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

BLOCK_ROWS = 1024  # rows that share a random stream
FACTORS = 16  # rank of what the features have in common; pairs correlate by +-strength/sqrt(FACTORS)
_TRUTH_STREAM = 2**64 - 1  # no block of rows ever has this index


class ToyTruth(NamedTuple):
    """What the rows are made of."""

    dictionary_FD: Float32[np.ndarray, "F D"]  # unit rows
    probability_F: Float[np.ndarray, " F"]  # of firing, falling with the index
    factor_FR: Float[np.ndarray, "F R"]  # rows of norm sqrt(correlation)

    def correlation_FF(self) -> Float[np.ndarray, "F F"]:
        """Correlation of the normals behind each pair of features."""
        shared_FF = self.factor_FR @ self.factor_FR.T
        np.fill_diagonal(shared_FF, 1.0)
        return shared_FF


class ToyRows(NamedTuple):
    """Activations and the codes behind them."""

    acts_BD: Float32[np.ndarray, "B D"]
    codes_BF: Float32[np.ndarray, "B F"]  # 0 where a feature does not fire, else in (0, 1]


def firing_probabilities(latents: int, active: float, decay: float) -> Float[np.ndarray, " latents"]:
    """Geometric in the index, ``active`` in sum; above 1 where so many cannot fire under that decay."""
    weights_F = decay ** np.arange(latents)
    return active * weights_F / weights_F.sum()


def make_truth(latents: int, width: int, active: float, decay: float, correlation: float, seed: int) -> ToyTruth:
    """Draw a dictionary of ``latents`` directions and the law by which they fire, from ``seed`` alone.

    ``correlation`` in [0, 1] is the share of each normal's variance that comes from the common factors.
    """
    random = _stream(seed, _TRUTH_STREAM)
    dictionary_FD = _unit_rows(random.standard_normal((latents, width)))
    factor_FR = _unit_rows(random.standard_normal((latents, FACTORS))) * np.sqrt(correlation)
    return ToyTruth(dictionary_FD.astype(np.float32), firing_probabilities(latents, active, decay), factor_FR)


def generate_rows(truth: ToyTruth, start_row: int, count: int, *, noise: float, seed: int) -> ToyRows:
    """Rows ``start_row`` to ``start_row + count``, the same bits however the rows are cut into calls.

    ``noise`` is the standard deviation of Gaussian noise added to each coordinate.
    """
    first, last = start_row // BLOCK_ROWS, -(-(start_row + count) // BLOCK_ROWS)
    blocks = [_block(truth, block, noise, seed) for block in range(first, last)]
    wanted = slice(start_row - first * BLOCK_ROWS, start_row - first * BLOCK_ROWS + count)
    return ToyRows(
        np.concatenate([block.acts_BD for block in blocks])[wanted],
        np.concatenate([block.codes_BF for block in blocks])[wanted],
    )


def _block(truth: ToyTruth, block: int, noise: float, seed: int) -> ToyRows:
    # A block is always computed whole: the last bits of a matrix product depend on its shape.
    random = _stream(seed, block)
    fires_BF = _firing(truth, random)
    magnitudes_BF = np.float32(1) - random.random(fires_BF.shape, dtype=np.float32)  # random() may be 0, never 1
    codes_BF = np.where(fires_BF, magnitudes_BF, np.float32(0))
    acts_BD = codes_BF @ truth.dictionary_FD
    acts_BD += np.float32(noise) * random.standard_normal(acts_BD.shape, dtype=np.float32)
    return ToyRows(acts_BD, codes_BF)


def _firing(truth: ToyTruth, random: np.random.Generator) -> Bool[np.ndarray, "B F"]:
    latents, factors = truth.factor_FR.shape
    own_F = np.sqrt(np.maximum(0.0, 1.0 - np.square(truth.factor_FR).sum(axis=1)))
    shared_BR = random.standard_normal((BLOCK_ROWS, factors))
    normals_BF = shared_BR @ truth.factor_FR.T
    normals_BF += own_F[None, :] * random.standard_normal((BLOCK_ROWS, latents))
    # Phi(z) < p, with the inverse taken of the few p instead of Phi of the many z.
    return normals_BF < np.array([_normal_quantile(p) for p in truth.probability_F.tolist()])[None, :]


def _normal_quantile(probability: float) -> float:
    if 0.0 < probability < 1.0:
        return NormalDist().inv_cdf(probability)
    return math.inf if probability >= 1.0 else -math.inf


def _stream(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def _unit_rows(rows_FD: Float[np.ndarray, "F D"]) -> Float[np.ndarray, "F D"]:
    return rows_FD / np.linalg.norm(rows_FD, axis=1, keepdims=True)
