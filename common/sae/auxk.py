"""AuxK: dead latents learn to explain what the living ones leave over.

Scaling and evaluating sparse autoencoders. Leo Gao, Tom Dupre la Tour, Henk Tillman, Gabriel Goh, Rajan Troll,
Alec Radford, Ilya Sutskever, Jan Leike, Jeffrey Wu. 2024. https://arxiv.org/abs/2406.04093, appendix A.2

    e     = sg(y - y_hat)                                    y: the target
    e_hat = TopK(z restricted to dead latents, k_aux) W_dec
    L_aux = min(1, dead / k_aux) ||e - e_hat||^2 / ||e - mean(e)||^2

with sums over rows and axes, batch means, sg = no gradient, k_aux = D/2; the paper weights it by 1/32. The z that are
chosen count with their sign, so that a dead latent learns from every row.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from saex_pipe.common.mesh import DATA, MODEL
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.matmul import matmul
from saex_pipe.common.sae.reconstruction import ratio_or_zero, squared_error_and_variance
from saex_pipe.common.sae.sharded import on_each_device
from saex_pipe.common.sae.sharding import partition

SIZE_STEP = 4  # the numbers of dead latents for which the loss is compiled: k_aux, 4 k_aux, all latents


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
) -> Float[Array, ""]:
    """L_aux of the batch, float32; 0 where no latent is dead.

    Args:
        variant: says what the encoder reads (``centre``).
        params: of which w_enc_DF, b_enc_F, w_dec_FD (and b_dec_D through ``centre``) get a gradient.
        x_BD: input, normalised.
        residual_BD: target minus reconstruction; gets no gradient.
        dead_F: the latents that count as dead.
        compute: of the matmuls.
        k: dead latents per row; None: half the target's width. At most the number of latents.
        stride: only every n-th row is read.
    """
    x_BD, residual_BD = x_BD[::stride], jax.lax.stop_gradient(residual_BD[::stride])
    latents = dead_F.shape[0]
    k = min(k or max(1, residual_BD.shape[1] // 2), latents)
    reconstruct = partial(_from_dead, variant, k, compute)
    if compute.mesh is not None:
        cut = {name: partition(name, leaf.shape, latents) for name, leaf in params.items()}
        reconstruct = on_each_device(compute.mesh, reconstruct, (cut, P(DATA), P(MODEL)), P(DATA))
    error, variance = squared_error_and_variance(residual_BD, reconstruct(params, x_BD, dead_F))
    return jnp.minimum(1.0, jnp.sum(dead_F, dtype=jnp.int32) / k) * ratio_or_zero(error, variance)


def _from_dead(
    variant: Variant, k: int, compute: Compute, params: Params, x_BD: Array, dead_F: Array
) -> Float[Array, "B D_out"]:
    """e_hat. On a mesh all but ``x_BD`` is of one device's own latents; the result is of those of all."""
    latents, dead_count = dead_F.shape[0], jnp.sum(dead_F, dtype=jnp.int32)
    # Work grows with the dead latents: the smallest of a few fixed sizes that holds them all.
    sizes = sorted({min(size, latents) for size in (k, SIZE_STEP * k, latents)})

    def none_dead(params: Params) -> Array:
        return jnp.zeros((x_BD.shape[0], params["w_dec_FD"].shape[1]), jnp.float32)

    def at_most(size: int, params: Params) -> Array:
        (dead_M,) = jnp.nonzero(dead_F, size=size, fill_value=0)
        is_dead_M = jnp.arange(size, dtype=jnp.int32) < dead_count
        centred_BD = variant.centre(params, x_BD)
        z_BM = matmul(centred_BD, params["w_enc_DF"][:, dead_M], compute.dtype) + params["b_enc_F"][dead_M][None]
        chosen_BM = jnp.broadcast_to(is_dead_M[None], z_BM.shape)
        if size > k or compute.mesh is not None:
            dead_z_BM = jnp.where(chosen_BM, jax.lax.stop_gradient(z_BM), -jnp.inf)
            largest_BK = jax.lax.top_k(dead_z_BM, min(k, size))[0]
            if compute.mesh is not None:
                largest_BK = jax.lax.top_k(jax.lax.all_gather(largest_BK, MODEL, axis=1, tiled=True), k)[0]
            chosen_BM &= dead_z_BM >= largest_BK[:, -1:]
        return matmul(jnp.where(chosen_BM, z_BM, 0.0), params["w_dec_FD"][dead_M], compute.dtype)

    most = dead_count if compute.mesh is None else jax.lax.pmax(dead_count, MODEL)
    branch = jnp.sum(most > jnp.array([0, *sizes[:-1]]), dtype=jnp.int32)
    own_BD = jax.lax.switch(branch, [none_dead, *(partial(at_most, size) for size in sizes)], params)
    return own_BD if compute.mesh is None else jax.lax.psum(own_BD, MODEL)
