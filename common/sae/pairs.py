"""Products with codes given as a list of (row, latent, value): for rows that differ in how many latents are active.

``sparse`` holds K active latents for every row; where a batch shares P = K B of them, the longest row would set K. Each
function has its gradient spelled out, so that the gradients too touch active latents only; sums are those of runs
(``sparse.runs_by_latent``), by latent or by row.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex_pipe.common.sae import sparse
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.crossover import Sizes, way
from saex_pipe.common.sae.matmul import transposed


class Pairs(NamedTuple):
    """Active latents of a batch; a value of 0 is padding."""

    values_P: Float[Array, " P"]  # float32
    rows_P: Int[Array, " P"]  # int32
    latents_P: Int[Array, " P"]  # int32


def pays(compute: Compute, sizes: Sizes) -> bool:
    """Whether to compute with pairs; K of ``sizes`` is the mean over rows. All products follow the decoder's."""
    # A list of pairs has no layout over devices.
    return compute.mesh is None and way("sum", sizes, compute, kernel=False) != "dense"


@jax.custom_vjp
def encoded(
    x_BD: Float[Array, "B D"],
    b_pre_D: Float[Array, " D"],
    w_enc_DF: Float[Array, "D F"],
    b_enc_F: Float[Array, " F"],
    pairs: Pairs,
) -> Float[Array, " P"]:
    """``pairs.values_P``, known to be entries of ``(x - b_pre) W_enc + b_enc``, with their gradients."""
    return pairs.values_P


def _encoded_forward(
    x_BD: Array, b_pre_D: Array, w_enc_DF: Array, b_enc_F: Array, pairs: Pairs
) -> tuple[Array, tuple[Array, Array, Array, Pairs]]:
    return pairs.values_P, (x_BD, b_pre_D, w_enc_DF, pairs)


def _encoded_backward(
    saved: tuple[Array, Array, Array, Pairs], out_P: Array
) -> tuple[Array, Array, Array, Array, Pairs]:
    x_BD, b_pre_D, w_enc_DF, pairs = saved
    latents = w_enc_DF.shape[1]
    dz_P = jnp.where(pairs.values_P > 0, out_P, 0.0)
    centred_BD = x_BD - b_pre_D[None]
    dw_enc_FD = sum_by(pairs.latents_P, dz_P, pairs.rows_P, centred_BD, latents)
    db_enc_F = jnp.zeros(latents, jnp.float32).at[pairs.latents_P].add(dz_P)
    # The compiler drops dx where nobody asks for it, as in training.
    dx_BD = sum_by(pairs.rows_P, dz_P, pairs.latents_P, w_enc_DF.T, x_BD.shape[0])
    no_gradient = jnp.zeros(pairs.rows_P.shape, jax.dtypes.float0)
    unused = Pairs(jnp.zeros_like(pairs.values_P), no_gradient, no_gradient)
    return dx_BD, -(w_enc_DF @ db_enc_F), transposed(dw_enc_FD), db_enc_F, unused


encoded.defvjp(_encoded_forward, _encoded_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def decoded(pairs: Pairs, w_dec_FD: Float[Array, "F D"], rows: int) -> Float[Array, "B D"]:
    """``codes_BF @ w_dec_FD`` of codes given by their pairs; ``rows`` is B."""
    return sum_by(pairs.rows_P, pairs.values_P, pairs.latents_P, w_dec_FD, rows)


def _decoded_forward(pairs: Pairs, w_dec_FD: Array, rows: int) -> tuple[Array, tuple[Pairs, Array]]:
    return decoded(pairs, w_dec_FD, rows), (pairs, w_dec_FD)


def _decoded_backward(rows: int, saved: tuple[Pairs, Array], out_BD: Array) -> tuple[Pairs, Array]:
    pairs, w_dec_FD = saved
    dvalues_P = dots(pairs, out_BD, w_dec_FD)
    dw_dec_FD = sum_by(pairs.latents_P, pairs.values_P, pairs.rows_P, out_BD, w_dec_FD.shape[0])
    no_gradient = jnp.zeros(pairs.rows_P.shape, jax.dtypes.float0)
    return Pairs(dvalues_P, no_gradient, no_gradient), dw_dec_FD


decoded.defvjp(_decoded_forward, _decoded_backward)


def dots(pairs: Pairs, rows_BD: Float[Array, "B D"], rows_FD: Float[Array, "F D"]) -> Float[Array, " P"]:
    """The entries of ``rows_BD @ rows_FD.T`` at the pairs, whose values are not read."""
    return sparse.dots(rows_BD, rows_FD, pairs.rows_P, pairs.latents_P)


def sum_by(keys_P: Array, weights_P: Array, sources_P: Array, rows_ND: Array, keys: int) -> Float[Array, "keys D"]:
    """For each key the sum over its pairs of weight times row ``source``; runs in place of one long scatter."""
    runs = sparse.runs_by_latent(keys_P[:, None], keys)
    return sparse.sum_runs(weights_P, jnp.pad(sources_P, (0, 1))[runs.pairs_NVR], runs, rows_ND, keys)
