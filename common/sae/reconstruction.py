"""How far a reconstruction is from its target, as a loss.

squared              sum over axes of (y - y_hat)^2, mean over rows
variance_normalised  sum over rows and axes of (y - y_hat)^2 / sum over both of (y - batch mean)^2
absolute             sum over axes of |y - y_hat|, mean over rows
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

Reconstruction = Literal["squared", "variance_normalised", "absolute"]


class Fit(NamedTuple):
    """How well one batch is reconstructed."""

    loss: Float[Array, ""]
    fvu: Float[Array, ""]  # fraction of the batch's variance left unexplained


def fit(kind: Reconstruction, target_BD: Float[Array, "B D"], recon_BD: Float[Array, "B D"]) -> Fit:
    """The loss of that kind; the equations are at the head of the file."""
    error, variance = squared_error_and_variance(target_BD, recon_BD)
    fvu = ratio_or_zero(error, variance)
    if kind == "variance_normalised":
        return Fit(fvu, fvu)
    if kind == "absolute":
        return Fit(jnp.sum(jnp.abs(target_BD - recon_BD)) / target_BD.shape[0], fvu)
    return Fit(error / target_BD.shape[0], fvu)


def squared_error_and_variance(
    target_BD: Float[Array, "B D"], recon_BD: Float[Array, "B D"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over rows and axes of (target - recon)^2 and of (target - batch mean)^2."""
    centred_BD = target_BD - jnp.mean(target_BD, axis=0, keepdims=True)
    return jnp.sum(jnp.square(target_BD - recon_BD)), jnp.sum(jnp.square(centred_BD))


def ratio_or_zero(numerator: Float[Array, "*n"], denominator: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """numerator / denominator, and 0 (with a gradient of 0) where the denominator is not above 0."""
    usable = denominator > 0
    return jnp.where(usable, numerator, 0.0) / jnp.where(usable, denominator, 1.0)
