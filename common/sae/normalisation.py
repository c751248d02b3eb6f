"""From the units of the raw activations to those of training, and back on export (``folding``).

none           x' = x
mean_square    x' = x / sqrt(E||x||^2 / D): unit mean square per dimension. Jumping Ahead: improving reconstruction
               fidelity with JumpReLU sparse autoencoders. Senthooran Rajamanoharan et al. 2024.
               https://arxiv.org/abs/2407.14435
expected_norm  x' = x sqrt(D) / E||x||. Circuits Updates, April 2024: "Update on how we train SAEs".
               https://transformer-circuits.pub/2024/april-update/index.html#training-saes
clipped        expected_norm, and rows longer than a multiple of sqrt(D) are scaled down to it: no row, an attention
               sink say, pulls more than so hard. What is within the limit is as without
ema            x' = x / sqrt(m), where m starts as in mean_square and follows the batches:
               m <- d m + (1 - d) E_batch||x||^2 / D
layer_norm     x' = (x - mean(x)) / (std(x) + 1e-5) with mean and std (n - 1) over the D entries of the row itself, as
               SAELens' ``normalize_activations="layer_norm"`` has it; of a crosscoder's row, over those of each tap.
               https://github.com/decoderesearch/SAELens
whitening_pca  x' = (x - E x) V (L + e)^-1/2 for the covariance V L V^T, with e = 1e-3 times the mean of L
               Data whitening improves sparse autoencoder learning. Ashwin Saraswatula, David Klindt. 2025.
               https://arxiv.org/abs/2511.13981
whitening_zca  x' = (x - E x) V (L + e)^-1/2 V^T: the whitening that moves rows least. Optimal whitening and
               decorrelation. Agnan Kessy, Alex Lewin, Korbinian Strimmer. 2018. https://arxiv.org/abs/1512.00809

All but layer_norm and the clipping are affine, and folded into the weights that are saved.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import block_diag
from jaxtyping import Array, Float

ROW_EPSILON = 1e-5  # SAELens' in layer_norm
RIDGE = 1e-3  # of the mean variance, added to every variance before whitening divides by it


class Affine(NamedTuple):
    """x' = (x - mean) M with a diagonal M, given as its diagonal, or any other that has an inverse."""

    mean_D: Float[Array, " D"]
    forward: Float[Array, " D"] | Float[Array, "D D"]
    backward: Float[Array, " D"] | Float[Array, "D D"]  # inverse of ``forward``

    def apply(self, x_BD: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """x to x'."""
        centred_BD = x_BD - self.mean_D[None]
        return centred_BD * self.forward[None] if self.forward.ndim == 1 else _product(centred_BD, self.forward)

    def before(self, w_DF: Float[Array, "D F"]) -> Float[Array, "D F"]:
        """``M w``: what multiplies x - mean as ``w`` multiplied x'."""
        return w_DF * self.forward[:, None] if self.forward.ndim == 1 else _product(self.forward, w_DF)

    def after(self, w_FD: Float[Array, "F D"]) -> Float[Array, "F D"]:
        """``w M^-1``: what gives x - mean where ``w`` gave x'."""
        return w_FD * self.backward[None] if self.backward.ndim == 1 else _product(w_FD, self.backward)

    def inverted(self) -> "Affine":
        """x' to x: x = (x' + mean M) M^-1."""
        mean_D = self._replace(mean_D=jnp.zeros_like(self.mean_D)).apply(-self.mean_D[None])[0]
        return Affine(mean_D, self.backward, self.forward)


class Whitening(NamedTuple):
    """Removes the mean and the correlations of the rows it was made from."""

    mean_D: Float[Array, " D"]
    matrix_DD: Float[Array, "D D"]
    inverse_DD: Float[Array, "D D"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale_D", "whitening"],
    meta_fields=["longest", "decay", "per_row", "tap_widths"],
)
@dataclass(frozen=True)
class Normaliser:
    """What is done to every row before training sees it. A pytree that travels in the training state.

    Of the rows of a crosscoder, each tap's part by itself, as ``tap_widths`` cut them.
    """

    scale_D: Float[Array, " D"]  # float32; multiplies the row, whitened if it is
    whitening: Whitening | None = None
    longest: float | None = None  # length, in units of training and of sqrt(D), that rows are scaled down to
    decay: float | None = None  # per step, of the mean square from which ``scale_D`` follows; None: it stays
    per_row: bool = False  # layer_norm, and nothing else
    tap_widths: tuple[int, ...] = ()

    def apply(self, x_BD: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Raw rows, of any float type, in the units of training, float32."""
        x_BD = x_BD.astype(jnp.float32)
        if self.per_row:
            return layer_norm(x_BD, self.tap_widths)[0]
        x_BD = self.affine().apply(x_BD)
        if self.longest is None:
            return x_BD
        return jnp.concatenate([_shortened(part_BD, self.longest) for part_BD in _parts(x_BD, self.tap_widths)], axis=1)

    def undo(self, y_BD: Float[Array, "B D"], raw_BD: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Reconstructions in the units of training in those of the rows ``raw_BD`` that they are of, float32.

        Clipping is not undone.
        """
        if self.per_row:
            return layer_norm(raw_BD.astype(jnp.float32), self.tap_widths)[1].undo(y_BD)
        return self.affine().inverted().apply(y_BD)

    def observe(self, x_BD: Float[Array, "B D"]) -> "Normaliser":
        """The normaliser after a batch of raw rows: the same, unless it tracks what it sees."""
        if self.decay is None:
            return self
        means_D = jnp.concatenate(
            [
                jnp.full(part_BD.shape[1], jnp.mean(jnp.square(part_BD.astype(jnp.float32))))
                for part_BD in _parts(x_BD, self.tap_widths)
            ]
        )
        tracked_D = self.decay / jnp.square(self.scale_D) + (1 - self.decay) * means_D
        return replace(self, scale_D=jax.lax.rsqrt(tracked_D))

    def affine(self) -> Affine:
        """The part of it that can be folded into weights: all of it, but for clipping and what is done per row."""
        if self.whitening is None:
            return Affine(jnp.zeros_like(self.scale_D), self.scale_D, 1 / self.scale_D)
        forward_DD = self.whitening.matrix_DD * self.scale_D[None]
        return Affine(self.whitening.mean_D, forward_DD, self.whitening.inverse_DD / self.scale_D[:, None])


class Normalisers(NamedTuple):
    """Of the two sides; equal except for a transcoder."""

    input: Normaliser
    target: Normaliser


class RowNorm(NamedTuple):
    """What layer_norm took off a row, and puts back on its reconstruction: the same on all axes of a tap."""

    mean_BD: Float[Array, "B D"]
    std_BD: Float[Array, "B D"]

    def undo(self, y_BD: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Raw rows from those in units of training. SAELens leaves the epsilon out here, and so does this."""
        return y_BD * self.std_BD + self.mean_BD


def layer_norm(x_BD: Float[Array, "B D"], tap_widths: tuple[int, ...] = ()) -> tuple[Float[Array, "B D"], RowNorm]:
    """Rows of mean 0 and standard deviation 1 (n - 1), and what undoes it; each tap's part by itself. All float32."""

    def spread_out(statistic: Callable[..., Array]) -> Array:
        of_taps = (
            jnp.broadcast_to(statistic(part_BD, axis=1, keepdims=True), part_BD.shape)
            for part_BD in _parts(x_BD, tap_widths)
        )
        return jnp.concatenate(list(of_taps), axis=1)

    norm = RowNorm(spread_out(jnp.mean), spread_out(partial(jnp.std, ddof=1)))
    return (x_BD - norm.mean_BD) / (norm.std_BD + ROW_EPSILON), norm


def whitening(rows: Sequence[Float[np.ndarray, "N D"]], kind: Literal["whitening_pca", "whitening_zca"]) -> Whitening:
    """Of these rows, computed in float64. Several taps are whitened each by itself."""
    parts = [Whitening(*(jnp.asarray(a, jnp.float32) for a in _whitened(part_ND, kind))) for part_ND in rows]
    means, matrices, inverses = zip(*parts, strict=True)
    return Whitening(jnp.concatenate(means), block_diag(*matrices), block_diag(*inverses))


def _whitened(rows_ND: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean_D = rows_ND.mean(axis=0, dtype=np.float64)
    centred_ND = rows_ND - mean_D
    variance_D, axes_DD = np.linalg.eigh(centred_ND.T @ centred_ND / max(len(rows_ND) - 1, 1))
    spread_D = np.sqrt(np.maximum(variance_D, 0) + max(RIDGE * variance_D.mean(), np.finfo(np.float32).tiny))
    turned_DD = axes_DD.T if kind == "whitening_zca" else np.eye(len(mean_D))
    return mean_D, (axes_DD / spread_D) @ turned_DD, turned_DD.T @ (axes_DD * spread_D).T


def _parts(x_BD: Float[Array, "B D"], tap_widths: tuple[int, ...]) -> list[Float[Array, "B d"]]:
    """Of the rows of a crosscoder, those of each tap."""
    return jnp.split(x_BD, list(accumulate(tap_widths))[:-1], axis=1)


def _shortened(x_BD: Float[Array, "B D"], longest: float) -> Float[Array, "B D"]:
    limit = longest * x_BD.shape[1] ** 0.5
    length_B1 = jnp.linalg.norm(x_BD, axis=1, keepdims=True)
    return x_BD * jnp.minimum(1.0, limit / jnp.maximum(length_B1, limit))


def _product(a_MN: Float[Array, "M N"], b_NP: Float[Array, "N P"]) -> Float[Array, "M P"]:
    return jnp.matmul(a_MN, b_NP, precision="highest")
