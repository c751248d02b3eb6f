"""What dead latents alone would reconstruct, at a cost that grows with their number."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from saex_pipe.common.mesh import DATA, MODEL
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.matmul import matmul
from saex_pipe.common.sae.sharded import on_each_device
from saex_pipe.common.sae.sharding import partition

SIZE_STEP = 4  # the numbers of dead latents that are compiled for: smallest, 4 smallest, all latents

# Pre-activations z_BM of dead latents, and is_dead_M, false for those that only pad, to codes_BM, 0 for the latter.
# On a mesh the M latents are one device's own.
DeadCodes = Callable[[Array, Array], Array]


def decode_dead(
    variant: Variant,
    params: Params,
    x_BD: Float[Array, "B D_in"],
    dead_F: Bool[Array, " F"],
    codes_of: DeadCodes,
    compute: Compute,
    *,
    smallest: int,
) -> Float[Array, "B D_out"]:
    """``codes_of(pre-activations of the dead latents) W_dec``, float32, without bias; 0 where no latent is dead.

    It is compiled for M = ``smallest``, four times that and all latents, and the first of them that holds the dead
    latents runs; of a stack the first that holds those of every SAE. w_enc_DF, b_enc_F, w_dec_FD and what
    ``variant.centre`` reads get a gradient.
    """
    decode: Callable[..., Array] = partial(_decode, variant, codes_of, compute, smallest)
    if compute.mesh is not None:
        cut = {name: partition(name, leaf.shape, dead_F.shape[0]) for name, leaf in params.items()}
        decode = on_each_device(compute.mesh, decode, (cut, P(DATA), P(MODEL)), P(DATA))
    return decode(params, x_BD, dead_F)


@custom_vmap
def _of_stack(branch: Int[Array, ""]) -> Int[Array, ""]:
    """``branch``, under ``vmap`` the largest of the stack: a switch by a number that differs would run every branch."""
    return branch


@_of_stack.def_vmap
def _largest_of_stack(size: int, batched: list[bool], branch_S: Int[Array, " S"]) -> tuple[Int[Array, ""], bool]:
    return jnp.max(branch_S) if batched[0] else branch_S, False


def _decode(
    variant: Variant,
    codes_of: DeadCodes,
    compute: Compute,
    smallest: int,
    params: Params,
    x_BD: Array,
    dead_F: Array,
) -> Float[Array, "B D_out"]:
    """On a mesh all but ``x_BD`` is of one device's own latents; the result is of those of all."""
    latents, dead_count = dead_F.shape[0], jnp.sum(dead_F, dtype=jnp.int32)
    sizes = sorted({min(size, latents) for size in (smallest, SIZE_STEP * smallest, latents)})

    def none_dead(params: Params) -> Array:
        return jnp.zeros((x_BD.shape[0], params["w_dec_FD"].shape[1]), jnp.float32)

    def at_most(size: int, params: Params) -> Array:
        (dead_M,) = jnp.nonzero(dead_F, size=size, fill_value=0)
        centred_BD = variant.centre(params, x_BD)
        z_BM = matmul(centred_BD, params["w_enc_DF"][:, dead_M], compute.dtype) + params["b_enc_F"][dead_M][None]
        codes_BM = codes_of(z_BM, jnp.arange(size, dtype=jnp.int32) < dead_count)
        return matmul(codes_BM, params["w_dec_FD"][dead_M], compute.dtype)

    most = dead_count if compute.mesh is None else jax.lax.pmax(dead_count, MODEL)
    branch = jnp.sum(most > jnp.array([0, *sizes[:-1]]), dtype=jnp.int32)
    own_BD = jax.lax.switch(_of_stack(branch), [none_dead, *(partial(at_most, size) for size in sizes)], params)
    return own_BD if compute.mesh is None else jax.lax.psum(own_BD, MODEL)
