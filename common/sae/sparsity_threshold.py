"""A penalty on latents that fire too rarely, from their pre-activations.

    L = sum_i (1 - phi_i / tau)_+ ||W_dec,i|| mean over rows of relu(-z_i)

phi_i is the share of recent rows on which latent i fired, tau the least it should be; unless given, a tenth of the mean
of all latents, L0 / (10 F). Every row that does not activate a starving latent pulls its pre-activation up, by the same
amount, until it fires often enough; neither dead nor rare latents need a residual to be of use for that.

The intent is that of saex's ``death_loss_type="sparsity_threshold"`` (https://github.com/neverix/saex). There the
shortfall is of logarithms and its gradient goes through relu(z), so that a latent which never fires gets none; here the
shortfall is a constant in [0, 1] that the pre-activations below 0 are weighted with. The weighting by decoder norms and
the form relu(-z) are those of the pre-activation loss of Circuits Updates, January 2025
(https://transformer-circuits.pub/2025/january-update/index.html).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DEFAULT_SHARE = 0.1  # of the mean frequency


def starving_loss(
    z_BF: Float[Array, "B F"],
    norms_F: Float[Array, " F"],
    frequency_F: Float[Array, " F"],
    threshold: float | Float[Array, ""] | None,
) -> Float[Array, ""]:
    """L of the batch, float32, in units of codes times decoder norms.

    Args:
        z_BF: pre-activations; a latent is active above 0.
        norms_F: lengths of the decoder's rows; get no gradient, or they would shrink.
        frequency_F: phi.
        threshold: tau, above 0; None: a tenth of the mean of ``frequency_F``.
    """
    least = DEFAULT_SHARE * jnp.mean(frequency_F) if threshold is None else jnp.asarray(threshold, jnp.float32)
    shortfall_F = jnp.where(frequency_F < least, 1 - frequency_F / jnp.where(least > 0, least, 1.0), 0.0)
    below_F = jnp.mean(jax.nn.relu(-z_BF), axis=0)
    return jnp.dot(jax.lax.stop_gradient(shortfall_F * norms_F), below_F)
