"""AuxK: dead latents learn to explain what the living ones leave over.

Scaling and evaluating sparse autoencoders. Leo Gao, Tom Dupre la Tour, Henk Tillman, Gabriel Goh, Rajan Troll,
Alec Radford, Ilya Sutskever, Jan Leike, Jeffrey Wu. 2024. https://arxiv.org/abs/2406.04093, appendix A.2

    e     = sg(y - y_hat)                                    y: the target
    e_hat = TopK(z restricted to dead latents, k_aux) W_dec
    L_aux = min(1, dead / k_aux) ||e - e_hat||^2 / ||e - mean(e)||^2

with sums over rows and axes, batch means, sg = no gradient, k_aux = D/2; the paper weights it by 1/32. The z that are
chosen count with their sign, so that a dead latent learns from every row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from saex_pipe.common.mesh import MODEL
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.cuts import row_cuts
from saex_pipe.common.sae.dead import DeadCodes, decode_dead
from saex_pipe.common.sae.reconstruction import ratio_or_zero, squared_error_and_variance
from saex_pipe.common.sae.sparse import Slots


def auxk_loss(
    variant: Variant,
    params: Params,
    x_BD: Float[Array, "B D_in"],
    residual_BD: Float[Array, "B D_out"],
    dead_F: Bool[Array, " F"],
    compute: Compute,
    *,
    k: int | None = None,
    stride: int = 1,
    slots: Slots | None = None,
) -> Float[Array, ""]:
    """L_aux of the batch, float32; 0 where no latent is dead.

    Args:
        variant: says what the encoder reads (``b_pre``).
        params: of which w_enc_FD, b_enc_F, w_dec_FD (and b_dec_D through ``b_pre``) get a gradient.
        x_BD: input, normalised.
        residual_BD: target minus reconstruction; gets no gradient.
        dead_F: the latents that count as dead.
        compute: of the matmuls.
        k: dead latents per row; None: half the target's width. At most the number of latents.
        stride: only every n-th row is read.
        slots: of w_enc_FD and w_dec_FD, which get their gradients by way of them; None: they get them directly.
    """
    x_BD, residual_BD = x_BD[::stride], jax.lax.stop_gradient(residual_BD[::stride])
    k = min(k or max(1, residual_BD.shape[1] // 2), dead_F.shape[0])

    axis = None if compute.mesh is None else MODEL

    def cut(z_BM: Array, is_dead_M: Array) -> Array:
        if z_BM.shape[1] <= k and axis is None:
            return jnp.full((z_BM.shape[0], 1), -jnp.inf)
        return row_cuts(jnp.where(is_dead_M[None], z_BM, -jnp.inf), k, axis)

    def largest(z_BM: Array, is_dead_M: Array, cut_B1: Array) -> Array:
        return jnp.where(is_dead_M[None] & (z_BM >= cut_B1), z_BM, 0.0)

    codes_of = DeadCodes(cut, largest)
    recon_BD = decode_dead(variant, params, x_BD, dead_F, codes_of, compute, smallest=k, slots=slots)
    error, variance = squared_error_and_variance(residual_BD, recon_BD)
    return jnp.minimum(1.0, jnp.sum(dead_F, dtype=jnp.int32) / k) * ratio_or_zero(error, variance)
