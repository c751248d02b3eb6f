"""Reconstructions of nested dictionaries, at the cost of the largest.

Level g decodes the first m_g latents. The reconstructions of all levels are running sums over the groups of latents
between two levels, so that every latent is decoded once:

    x_hat_g = x_hat_{g-1} + f_{m_{g-1} .. m_g} W_dec,{m_{g-1} .. m_g}
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from saex_pipe.common.mesh import DATA, MODEL
from saex_pipe.common.sae import few
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.pairs import Pairs, decoded
from saex_pipe.common.sae.reconstruction import Fit, Reconstruction, fit
from saex_pipe.common.sae.sharded import on_each_device


def decode_nested(
    codes_BF: Float[Array, "B F"],
    w_dec_FD: Float[Array, "F D"],
    widths: Sequence[int],
    compute: Compute,
    *,
    wanted_BF: Bool[Array, "B F"] | None = None,
) -> list[Float[Array, "B D"]]:
    """Reconstructions by the first ``width`` latents, without bias, for each of the ascending ``widths``.

    Codes that are 0 get a gradient where they are ``wanted``, as in ``few.decoded``.
    """
    if compute.mesh is not None and len(widths) > 1:
        decode = partial(_groups_here, widths=widths, compute=compute)
        cut = on_each_device(compute.mesh, decode, (P(DATA, MODEL), P(DATA, MODEL), P(MODEL)), P(None, DATA))
        return list(jnp.cumsum(cut(codes_BF, wanted_BF, w_dec_FD), axis=0))
    levels: list[Array] = []
    start = 0
    for width in widths:
        wanted_BG = None if wanted_BF is None else wanted_BF[:, start:width]
        group_BD = few.decoded(codes_BF[:, start:width], w_dec_FD[start:width], compute, wanted_BF=wanted_BG)
        levels.append(levels[-1] + group_BD if levels else group_BD)
        start = width
    return levels


def _groups_here(
    codes_BF: Array, wanted_BF: Array | None, w_dec_FD: Array, *, widths: Sequence[int], compute: Compute
) -> Float[Array, "G B D"]:
    """The product of every group of latents, G in all; the arguments are of one device's own latents.

    Where a group begins need not be where a shard does: each device decodes the groups that it holds a part of.
    """
    own = w_dec_FD.shape[0]
    latents_F = jax.lax.axis_index(MODEL) * own + jnp.arange(own, dtype=jnp.int32)
    groups = []
    for start, stop in pairwise((0, *widths)):
        inside_F = (latents_F >= start) & (latents_F < stop)

        def product(codes_BF: Array, wanted_BF: Array | None, w_dec_FD: Array, inside_F: Array = inside_F) -> Array:
            wanted_BG = None if wanted_BF is None else wanted_BF & inside_F[None]
            return few.decoded_here(jnp.where(inside_F[None], codes_BF, 0.0), wanted_BG, w_dec_FD, compute, False)

        def nothing(codes_BF: Array, wanted_BF: Array | None, w_dec_FD: Array) -> Array:
            return jnp.zeros((codes_BF.shape[0], w_dec_FD.shape[1]), jnp.float32)

        groups.append(jax.lax.cond(jnp.any(inside_F), product, nothing, codes_BF, wanted_BF, w_dec_FD))
    return jax.lax.psum(jnp.stack(groups), MODEL)


def decode_nested_pairs(
    pairs: Pairs, w_dec_FD: Float[Array, "F D"], widths: Sequence[int], rows: int
) -> tuple[list[Float[Array, "B D"]], Float[Array, "F D"]]:
    """The same of codes given by their pairs, and the slot of W_dec; ``rows`` is B."""
    # A row of the product for each group and batch row.
    group_P = jnp.sum(pairs.latents_P[None] >= jnp.array(widths, jnp.int32)[:, None], axis=0, dtype=jnp.int32)
    product, slot_FD = decoded(pairs._replace(rows_P=group_P * rows + pairs.rows_P), w_dec_FD, len(widths) * rows)
    levels = [product[:rows]]
    for start in range(rows, len(widths) * rows, rows):
        levels.append(levels[-1] + product[start : start + rows])
    return levels, slot_FD


def fit_nested(kind: Reconstruction, target_BD: Float[Array, "B D"], levels: Sequence[Float[Array, "B D"]]) -> Fit:
    """The sum of the losses of all levels, once; the unexplained variance of the last, which is the whole SAE."""
    fits = [fit(kind, target_BD, recon_BD) for recon_BD in levels]
    return Fit(sum((each.loss for each in fits[1:]), start=fits[0].loss), fits[-1].fvu)
