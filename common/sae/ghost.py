"""Ghost gradients: dead latents learn to explain the residual through an activation that is never flat.

Circuits Updates, January 2024: "Ghost Grads: an improvement on resampling". Adam Jermyn, Adly Templeton.
https://transformer-circuits.pub/2024/jan-update/index.html#dict-learning-resampling

    e  = sg(y - y_hat)                                  y: the target
    g  = h(z restricted to dead latents) W_dec          h = exp, or softplus (as in saex)
    g' = g sg(||e|| / (2 ||g||))                        of each row: half as long as the residual
    L  = sg(L_rec / ||e - g'||^2) ||e - g'||^2          sums over the batch: as large as the reconstruction loss

with sg = no gradient. L is 0 where no latent is dead. With ``by_share`` it is multiplied by the share of dead latents,
as in saex, so that a few dead latents do not weigh as much as the whole reconstruction.

Since g is brought to a set length, h = exp is indifferent to a shift of all dead latents: they learn which rows to fire
on, but a bias that has buried all of them alike does not come back. Resampling or AuxK help there.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from saex_pipe.common.mesh import MODEL
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Params, Variant, row_norms
from saex_pipe.common.sae.dead import DeadCodes, decode_dead
from saex_pipe.common.sae.reconstruction import ratio_or_zero


def ghost_loss(
    activation: Literal["exp", "softplus"],
    variant: Variant,
    params: Params,
    x_BD: Float[Array, "B D_in"],
    residual_BD: Float[Array, "B D_out"],
    reconstruction_loss: Float[Array, ""],
    dead_F: Bool[Array, " F"],
    compute: Compute,
    *,
    by_share: bool = False,
) -> Float[Array, ""]:
    """L of the batch, float32.

    Args:
        activation: h.
        variant: says what the encoder reads (``b_pre``).
        params: of which w_enc_FD, b_enc_F, w_dec_FD (and b_dec_D through ``b_pre``) get a gradient.
        x_BD: input, normalised.
        residual_BD: target minus reconstruction; gets no gradient.
        reconstruction_loss: L_rec, in any unit; gets no gradient.
        dead_F: the latents that count as dead.
        compute: of the matmuls.
        by_share: multiply by the share of dead latents.
    """
    residual_BD, size = jax.lax.stop_gradient((residual_BD, reconstruction_loss))

    def reference(z_BM: Array, is_dead_M: Array) -> Array:
        """The row's largest, which g' is indifferent to."""
        peak_B1 = jnp.max(jnp.where(is_dead_M[None], z_BM, jnp.finfo(jnp.float32).min), axis=1, keepdims=True)
        return peak_B1 if compute.mesh is None else jax.lax.pmax(peak_B1, MODEL)

    def never_flat(z_BM: Array, is_dead_M: Array, peak_B1: Array) -> Array:
        if activation == "softplus":
            return jnp.where(is_dead_M[None], jax.nn.softplus(z_BM), 0.0)
        # Relative to the largest it neither overflows nor vanishes.
        return jnp.exp(jnp.where(is_dead_M[None], z_BM, jnp.finfo(jnp.float32).min) - peak_B1)

    smallest = min(max(1, residual_BD.shape[1] // 2), dead_F.shape[0])
    ghost_BD = decode_dead(variant, params, x_BD, dead_F, DeadCodes(reference, never_flat), compute, smallest=smallest)
    half_B = jax.lax.stop_gradient(ratio_or_zero(row_norms(residual_BD), 2 * row_norms(ghost_BD)))
    error = jnp.sum(jnp.square(residual_BD - half_B[:, None] * ghost_BD))
    weight = jnp.mean(dead_F, dtype=jnp.float32) if by_share else jnp.any(dead_F).astype(jnp.float32)
    return weight * error * jax.lax.stop_gradient(ratio_or_zero(size, error))
