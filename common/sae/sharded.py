"""The products of ``sparse.py`` where latents lie over the ``model`` axis of a mesh and rows over ``data``.

Every device chooses among its own latents; the values of all candidates, k a device and row, are gathered, and each
device keeps those of its own that are among the k largest. From there on it reads and adds up the active latents of
its own shard only: reconstructions are sums over ``model``, gradients of weights sums over ``data``. Both follow from
``jax.shard_map``, which differentiates through the functions of ``sparse.py`` and their own gradients.

Without a mesh these are the functions of ``sparse.py``. With one there are no slots.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from saex_pipe.common.mesh import DATA, MODEL
from saex_pipe.common.sae import sparse
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.sparse import ActiveCodes

# On a mesh K is model x min(k, F / model): the k active latents of a row, each in the columns of its own shard, and
# padding. Latents are counted over all shards.
ACTIVE = P(DATA, MODEL)


def on_each_device(mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``function`` of every device's own parts, which may sum over the axes of the mesh."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def topk_codes(
    x_BD: Float[Array, "B D"],
    b_pre_D: Float[Array, " D"],
    w_enc_FD: Float[Array, "F D"],
    b_enc_F: Float[Array, " F"],
    k: int,
    compute: Compute,
) -> tuple[ActiveCodes, Float[Array, "F D"] | None]:
    """relu of the ``k`` largest entries of each row of ``(x - b_pre) W_enc + b_enc``, and the slot of W_enc."""
    if compute.mesh is None:
        return sparse.topk_codes(x_BD, b_pre_D, w_enc_FD, b_enc_F, k, compute)

    def local(x_BD: Array, b_pre_D: Array, w_enc_FD: Array, b_enc_F: Array) -> ActiveCodes:
        own, _ = sparse.topk_codes(x_BD, b_pre_D, w_enc_FD, b_enc_F, min(k, b_enc_F.shape[0]), compute)
        # Both are sorted: what a device keeps comes before what it does not.
        count_B = own_among_largest(own.values_BK, k)
        kept_BK = jnp.arange(own.values_BK.shape[1], dtype=jnp.int32)[None] < count_B[:, None]
        return ActiveCodes(jnp.where(kept_BK, own.values_BK, 0.0), own.latents_BK + _first_latent(b_enc_F))

    in_specs = P(DATA), P(), P(MODEL), P(MODEL)
    return on_each_device(compute.mesh, local, in_specs, ACTIVE)(x_BD, b_pre_D, w_enc_FD, b_enc_F), None


def own_among_largest(values_BK: Float[Array, "B K"], k: int) -> Int[Array, " B"]:
    """How many of a device's ``values_BK``, largest first, are among the ``k`` largest of all devices of its row."""
    all_BC = jax.lax.all_gather(jax.lax.stop_gradient(values_BK), MODEL, axis=1, tiled=True)
    places_BK = jax.lax.top_k(all_BC, k)[1]
    own_BK = places_BK // values_BK.shape[1] == jax.lax.axis_index(MODEL)
    return jnp.sum(own_BK, axis=1, dtype=jnp.int32)


def decode_active(
    active: ActiveCodes, w_dec_FD: Float[Array, "F D"], compute: Compute
) -> tuple[Float[Array, "B D"], Float[Array, "F D"] | None]:
    """``codes_BF @ w_dec_FD`` of codes given by their active latents, and the slot of W_dec."""
    if compute.mesh is None:
        return sparse.decode_active(active, w_dec_FD, compute)

    def local(active: ActiveCodes, w_dec_FD: Array) -> Array:
        own = ActiveCodes(active.values_BK, active.latents_BK - _first_latent(w_dec_FD))
        return jax.lax.psum(sparse.decode_active(own, w_dec_FD, compute)[0], MODEL)

    return on_each_device(compute.mesh, local, (ACTIVE, P(MODEL)), P(DATA))(active, w_dec_FD), None


def dense_codes(active: ActiveCodes, latents: int, compute: Compute) -> Float[Array, "B F"]:
    """All codes of each row."""

    def local(active: ActiveCodes, parts: int = 1) -> Array:
        rows, own = active.values_BK.shape[0], latents // parts
        codes_BF = jnp.zeros((rows, own), jnp.float32)
        return jnp.put_along_axis(codes_BF, active.latents_BK % own, active.values_BK, axis=1, inplace=False)

    if compute.mesh is None:
        return local(active)
    parts = compute.mesh.shape[MODEL]
    return on_each_device(compute.mesh, lambda active: local(active, parts), (ACTIVE,), P(DATA, MODEL))(active)


def rows_active(active: ActiveCodes, latents: int, compute: Compute) -> Int[Array, " F"]:
    """On how many rows each latent is active."""

    def local(active: ActiveCodes, parts: int = 1) -> Array:
        own = latents // parts
        positive_BK = (active.values_BK > 0).astype(jnp.int32)
        return jnp.zeros(own, jnp.int32).at[active.latents_BK % own].add(positive_BK)

    if compute.mesh is None:
        return local(active)
    parts = compute.mesh.shape[MODEL]

    def summed(active: ActiveCodes) -> Array:
        return jax.lax.psum(local(active, parts), DATA)

    return on_each_device(compute.mesh, summed, (ACTIVE,), P(MODEL))(active)


def _first_latent(own_F: Float[Array, "F ..."]) -> Int[Array, ""]:
    """The number of the first latent on this device."""
    return jax.lax.axis_index(MODEL) * own_F.shape[0]
