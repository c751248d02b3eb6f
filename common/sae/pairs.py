"""Products with codes given as a list of (row, latent, value): for rows that differ in how many latents are active.

``sparse`` holds K active latents for every row; where a batch shares P = K B of them, the longest row would set K. Each
function has its gradient spelled out, so that the gradients too touch active latents only; sums are those of runs
(``sparse.runs_by_latent``), by latent or by row. Each hands out a slot for its weight, as those of ``sparse`` do.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex_pipe.common.sae import sparse
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.crossover import Sizes, gathers_pay


class Pairs(NamedTuple):
    """Active latents of a batch; a value of 0 is padding."""

    values_P: Float[Array, " P"]  # float32
    rows_P: Int[Array, " P"]  # int32
    latents_P: Int[Array, " P"]  # int32


def pays(compute: Compute, sizes: Sizes) -> bool:
    """Whether a step computes with one list of pairs; K of ``sizes`` is the mean over rows.

    One list has no layout over devices: on a mesh each makes its own (``few``).
    """
    return compute.mesh is None and gathers_pay(("sum", "dot", "scatter", "scatter"), sizes, compute)


@jax.custom_vjp
def encoded(
    x_BD: Float[Array, "B D"],
    b_pre_D: Float[Array, " D"],
    w_enc_FD: Float[Array, "F D"],
    b_enc_F: Float[Array, " F"],
    pairs: Pairs,
) -> tuple[Float[Array, " P"], Float[Array, "F D"]]:
    """``pairs.values_P``, known to be entries of ``(x - b_pre) W_enc + b_enc``, with their gradients, and the slot of
    W_enc."""
    return pairs.values_P, jnp.zeros_like(w_enc_FD)


def _encoded_forward(
    x_BD: Array, b_pre_D: Array, w_enc_FD: Array, b_enc_F: Array, pairs: Pairs
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array, Pairs]]:
    return encoded(x_BD, b_pre_D, w_enc_FD, b_enc_F, pairs), (x_BD, b_pre_D, w_enc_FD, pairs)


def _encoded_backward(
    saved: tuple[Array, Array, Array, Pairs], out: tuple[Array, Array]
) -> tuple[Array, Array, Array, Array, Pairs]:
    (x_BD, b_pre_D, w_enc_FD, pairs), (out_P, start_FD) = saved, out
    latents = w_enc_FD.shape[0]
    dz_P = jnp.where(pairs.values_P > 0, out_P, 0.0)
    centred_BD = x_BD - b_pre_D[None]
    dw_enc_FD = sum_by(pairs.latents_P, dz_P, pairs.rows_P, centred_BD, start_FD)
    db_enc_F = jnp.zeros(latents, jnp.float32).at[pairs.latents_P].add(dz_P)
    # The compiler drops dx where nobody asks for it, as in training.
    dx_BD = sum_by(pairs.rows_P, dz_P, pairs.latents_P, w_enc_FD, jnp.zeros_like(x_BD))
    no_gradient = jnp.zeros(pairs.rows_P.shape, jax.dtypes.float0)
    unused = Pairs(jnp.zeros_like(pairs.values_P), no_gradient, no_gradient)
    return dx_BD, -(db_enc_F @ w_enc_FD), dw_enc_FD, db_enc_F, unused


encoded.defvjp(_encoded_forward, _encoded_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def decoded(pairs: Pairs, w_dec_FD: Float[Array, "F D"], rows: int) -> tuple[Float[Array, "B D"], Float[Array, "F D"]]:
    """``codes_BF @ w_dec_FD`` of codes given by their pairs, and the slot of W_dec; ``rows`` is B."""
    start_BD = jnp.zeros((rows, w_dec_FD.shape[1]), jnp.float32)
    return sum_by(pairs.rows_P, pairs.values_P, pairs.latents_P, w_dec_FD, start_BD), jnp.zeros_like(w_dec_FD)


def _decoded_forward(pairs: Pairs, w_dec_FD: Array, rows: int) -> tuple[tuple[Array, Array], tuple[Pairs, Array]]:
    return decoded(pairs, w_dec_FD, rows), (pairs, w_dec_FD)


def _decoded_backward(rows: int, saved: tuple[Pairs, Array], out: tuple[Array, Array]) -> tuple[Pairs, Array]:
    (pairs, w_dec_FD), (out_BD, start_FD) = saved, out
    dvalues_P = dots(pairs, out_BD, w_dec_FD)
    dw_dec_FD = sum_by(pairs.latents_P, pairs.values_P, pairs.rows_P, out_BD, start_FD)
    no_gradient = jnp.zeros(pairs.rows_P.shape, jax.dtypes.float0)
    return Pairs(dvalues_P, no_gradient, no_gradient), dw_dec_FD


decoded.defvjp(_decoded_forward, _decoded_backward)


def dots(pairs: Pairs, rows_BD: Float[Array, "B D"], rows_FD: Float[Array, "F D"]) -> Float[Array, " P"]:
    """The entries of ``rows_BD @ rows_FD.T`` at the pairs, whose values are not read."""
    return sparse.dots(rows_BD, rows_FD, pairs.rows_P, pairs.latents_P)


def sum_by(
    keys_P: Array, weights_P: Array, sources_P: Array, rows_ND: Array, start_KD: Float[Array, "keys D"]
) -> Float[Array, "keys D"]:
    """``start_KD``, and for each key the sum over its pairs of weight times row ``source`` more; runs in place of one
    long scatter."""
    runs = sparse.runs_by_latent(keys_P[:, None], start_KD.shape[0])
    return sparse.sum_runs(weights_P, jnp.pad(sources_P, (0, 1))[runs.pairs_NVR], runs, rows_ND, start_KD)
