"""Products with codes of which only K of F per row are active: work grows with K, not with F.

``topk_codes`` and ``decode_active`` have their gradients spelled out (``jax.custom_vjp``), so that those too touch
active latents only. They equal the dense products within float32 rounding, and are deterministic. Where
``crossover.py`` says that it is faster, they multiply matrices or run the kernels of ``pallas_sparse.py`` instead.

Beside its result each hands out a slot for its weight: zeros, latents first, whose gradient the gradient of the weight
starts from. What else uses the weight adds its own gradient by way of the slot, and saves zeros of the weight's size
and two passes over them: 8 % of a TopK step with AuxK.

The milliseconds below were measured on two CPU cores at B=2048, D=576, K=32, and F=4608 where no other is named.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex_pipe.common.sae import pallas_sparse
from saex_pipe.common.sae.compute import PLAIN, Compute, gradient_dtype
from saex_pipe.common.sae.crossover import Product, Sizes, Way, way
from saex_pipe.common.sae.matmul import by_transposed, matmul
from saex_pipe.common.sae.select import largest
from saex_pipe.common.sae.stack import largest_of_stack

UNROLL = 8  # rows added per pass over the sum: 3.5 ms, against 7 ms one by one
LANES = 64  # columns that a dot adds up side by side
DOT_PAIRS = 1024  # pairs whose gathered rows fit into cache
RUN_LENGTH = 8  # batch rows summed before one is added to the result
RUN_BLOCKS = 16  # blocks of runs, so that the partial sums stay in cache


class ActiveCodes(NamedTuple):
    """The active latents of each row, largest first; a value of 0 is padding."""

    values_BK: Float[Array, "B K"]
    latents_BK: Int[Array, "B K"]


class Slots(NamedTuple):
    """Zeros whose gradients are added to those of the encoder's weight and of the decoder's."""

    w_enc_FD: Float[Array, "F D_in"]
    w_dec_FD: Float[Array, "F D_out"]


class Runs(NamedTuple):
    """Active (row, latent) pairs sorted by latent and cut into runs of at most R pairs of one latent.

    Runs come in blocks: N blocks of V runs of R pairs, of which the first ``used`` hold all that are not empty.
    """

    pairs_NVR: Int[Array, "N V R"]  # index into the flattened [B, K] pairs; B K for an empty place
    latents_NV: Int[Array, "N V"]
    used: Int[Array, ""]


def gather_sum(active: ActiveCodes, rows_FD: Float[Array, "F D"]) -> Float[Array, "B D"]:
    """``codes_BF @ rows_FD``: for every batch row the weighted sum of K rows."""

    def add_one(sum_BD: Array, one: ActiveCodes) -> tuple[Array, None]:
        return sum_BD + one.values_BK[:, None] * rows_FD[one.latents_BK], None

    start_BD = jnp.zeros((active.values_BK.shape[0], rows_FD.shape[1]), rows_FD.dtype)
    by_rank = ActiveCodes(active.values_BK.T, active.latents_BK.T)
    return jax.lax.scan(add_one, start_BD, by_rank, unroll=min(UNROLL, by_rank.values_BK.shape[0]))[0]


def gather_dot(
    rows_BD: Float[Array, "B D"], rows_FD: Float[Array, "F D"], latents_BK: Int[Array, "B K"]
) -> Float[Array, "B K"]:
    """The entries ``latents_BK`` of ``rows_BD @ rows_FD.T``."""

    rows_P = jnp.repeat(jnp.arange(rows_BD.shape[0], dtype=jnp.int32), latents_BK.shape[1])
    return dots(rows_BD, rows_FD, rows_P, latents_BK.reshape(-1)).reshape(latents_BK.shape)


def dots(
    rows_BD: Float[Array, "B D"], rows_FD: Float[Array, "F D"], rows_P: Int[Array, " P"], latents_P: Int[Array, " P"]
) -> Float[Array, " P"]:
    """The entries (row, latent) of ``rows_BD @ rows_FD.T``."""
    sides = rows_BD, rows_FD, rows_P, latents_P
    if rows_BD.shape[1] % LANES:
        return _dots_by_rows(*sides)
    return jax.lax.platform_dependent(*sides, cpu=_dots_by_lanes, default=_dots_by_rows)


def _dots_by_rows(rows_BD: Array, rows_FD: Array, rows_P: Array, latents_P: Array) -> Array:
    def dot(places: tuple[Array, Array]) -> Array:
        row, latent = places
        # One product of a matrix and a vector in place of a product for each pair.
        return jnp.dot(rows_BD[row] * rows_FD[latent], ones_D, precision="highest")

    ones_D = jnp.ones(rows_BD.shape[1], jnp.float32)
    return jax.lax.map(dot, (rows_P, latents_P), batch_size=DOT_PAIRS)


def _dots_by_lanes(rows_BD: Array, rows_FD: Array, rows_P: Array, latents_P: Array) -> Array:
    """Sums of every 64th product first, all in one loop that writes no gathered row: 4.6 ms, against 9 by rows, for
    65,536 pairs of width 576."""
    lanes = rows_BD.shape[1] // LANES

    def products(lane: int) -> Array:
        return of(rows_BD).at[rows_P, lane].get(mode="clip") * of(rows_FD).at[latents_P, lane].get(mode="clip")

    def of(rows_XD: Array) -> Array:
        return rows_XD.reshape(-1, lanes, LANES)

    sums_PL = sum((products(lane) for lane in range(1, lanes)), start=products(0))
    return jnp.dot(sums_PL, jnp.ones(LANES, jnp.float32), precision="highest")


def runs_by_latent(latents_BK: Int[Array, "B K"], latents: int) -> Runs:
    """The layout in which ``scatter_sum`` reads its pairs; 5 ms, shared by all sums over the same latents."""
    pairs = latents_BK.size
    flat_P = latents_BK.reshape(-1)
    sorted_P, order_P = _sorted(flat_P, latents)
    count_F = jnp.zeros(latents, jnp.int32).at[flat_P].add(1)
    runs_F = (count_F + RUN_LENGTH - 1) // RUN_LENGTH
    first_pair_F, first_run_F = jnp.cumsum(count_F) - count_F, jnp.cumsum(runs_F) - runs_F
    rank_P = jnp.arange(pairs, dtype=jnp.int32) - first_pair_F[sorted_P]
    run_P = first_run_F[sorted_P] + rank_P // RUN_LENGTH
    # No latent wastes more than one run, and full runs number at most pairs / RUN_LENGTH.
    run_limit = min(latents, pairs) + pairs // RUN_LENGTH
    per_block = -(-run_limit // RUN_BLOCKS)
    places = per_block * RUN_BLOCKS
    place_P = run_P * RUN_LENGTH + rank_P % RUN_LENGTH
    pairs_Q = jnp.full(places * RUN_LENGTH, pairs, jnp.int32).at[place_P].set(order_P, unique_indices=True)
    latents_V = jnp.zeros(places, jnp.int32).at[run_P].set(sorted_P)
    used = (runs_F.sum() + per_block - 1) // per_block
    return Runs(pairs_Q.reshape(RUN_BLOCKS, per_block, RUN_LENGTH), latents_V.reshape(RUN_BLOCKS, per_block), used)


def _sorted(keys_P: Int[Array, " P"], keys: int) -> tuple[Int[Array, " P"], Int[Array, " P"]]:
    """The keys, all below ``keys``, in their order, and the places they come from."""
    pairs = keys_P.shape[0]
    if keys * pairs <= 1 << 32:  # as one number each, which takes 2.4 ms for 65,536 pairs in place of 13
        number = jnp.int32 if keys * pairs <= 1 << 31 else jnp.uint32
        both_P = jnp.sort(keys_P.astype(number) * pairs + jnp.arange(pairs, dtype=number))
        return (both_P // pairs).astype(jnp.int32), (both_P % pairs).astype(jnp.int32)
    order_P = jnp.argsort(keys_P, stable=True).astype(jnp.int32)
    return keys_P[order_P], order_P


def scatter_sum(
    weights_BK: Float[Array, "B K"], runs: Runs, rows_BD: Float[Array, "B D"], start_FD: Float[Array, "F D"]
) -> Float[Array, "F D"]:
    """``start_FD + weights_BF.T @ rows_BD``: every batch row, weighted, is added to the rows of its K latents.

    Adding pair by pair takes 16 to 20 ms, all on one core, since a scatter is serial. Sums of whole runs are gathers,
    which use all cores, and leave a scatter an eighth as long: 5 ms, and 5 ms more for ``runs_by_latent``.
    """
    rows_NVR = jnp.minimum(runs.pairs_NVR // weights_BK.shape[1], rows_BD.shape[0] - 1)
    return sum_runs(weights_BK.reshape(-1), rows_NVR, runs, rows_BD, start_FD)


def sum_runs(
    weights_P: Float[Array, " P"],
    sources_NVR: Int[Array, "N V R"],
    runs: Runs,
    rows_ND: Float[Array, "rows D"],
    start_KD: Float[Array, "keys D"],
) -> Float[Array, "keys D"]:
    """``start_KD``, and for each key (``latents_NV`` of the runs) the sum over its pairs of weight times row ``source``
    more."""
    weights_NVR = jnp.pad(weights_P, (0, 1))[runs.pairs_NVR]

    def add_block(block: Array, sum_KD: Array) -> Array:
        weights_VR, sources_VR, keys_V = weights_NVR[block], sources_NVR[block], runs.latents_NV[block]
        partial_VD = sum(weights_VR[:, i, None] * rows_ND[sources_VR[:, i]] for i in range(RUN_LENGTH))
        return sum_KD.at[keys_V].add(partial_VD)

    # One number for all SAEs of a stack, or each would be copied in every block. Blocks beyond its own add 0.
    blocks = largest_of_stack(runs.used)
    return jax.lax.fori_loop(0, blocks, add_block, start_KD)


def _way(product: Product, latents_BK: Array, rows_XD: Array, latents: int, compute: Compute) -> Way:
    sizes = Sizes(latents_BK.shape[0], rows_XD.shape[1], latents, latents_BK.shape[1])
    return way(product, sizes, compute, kernel=pallas_sparse.can_run(latents_BK, rows_XD))


def _matrix(active: ActiveCodes, latents: int) -> Float[Array, "B F"]:
    """The codes as a matrix. Added up, so that padding may name a latent that is active."""
    rows_B1 = jnp.arange(active.latents_BK.shape[0], dtype=jnp.int32)[:, None]
    codes_BF = jnp.zeros((active.latents_BK.shape[0], latents), jnp.float32)
    return codes_BF.at[rows_B1, active.latents_BK].add(active.values_BK)


def _dense(a_MN: Array, b_NP: Array, compute: Compute) -> Array:
    # The sparse ways have no rounding to the levels of int8 either.
    return matmul(a_MN, b_NP, gradient_dtype(compute.dtype))


def _sum(active: ActiveCodes, rows_FD: Array, compute: Compute) -> Float[Array, "B D"]:
    """``codes_BF @ rows_FD``."""
    latents = rows_FD.shape[0]
    chosen = _way("sum", active.latents_BK, rows_FD, latents, compute)
    if chosen == "pallas":
        return pallas_sparse.gather_sum(active.values_BK, active.latents_BK, rows_FD)
    return _dense(_matrix(active, latents), rows_FD, compute) if chosen == "dense" else gather_sum(active, rows_FD)


def _dot(rows_BD: Array, rows_FD: Array, latents_BK: Array, compute: Compute) -> Float[Array, "B K"]:
    """The entries ``latents_BK`` of ``rows_BD @ rows_FD.T``."""
    chosen = _way("dot", latents_BK, rows_FD, rows_FD.shape[0], compute)
    if chosen == "pallas":
        return pallas_sparse.gather_dot(rows_BD, rows_FD, latents_BK)
    if chosen == "dense":
        return jnp.take_along_axis(_dense(rows_BD, rows_FD.T, compute), latents_BK, axis=1)
    return gather_dot(rows_BD, rows_FD, latents_BK)


def _scatter(active: ActiveCodes, rows_BD: Array, start_FD: Array, compute: Compute) -> Float[Array, "F D"]:
    """``start_FD + codes_BF.T @ rows_BD``."""
    latents = start_FD.shape[0]
    if _way("scatter", active.latents_BK, rows_BD, latents, compute) == "dense":
        return start_FD + _dense(_matrix(active, latents).T, rows_BD, compute)
    return scatter_sum(active.values_BK, runs_by_latent(active.latents_BK, latents), rows_BD, start_FD)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def topk_codes(
    x_BD: Float[Array, "B D"],
    b_pre_D: Float[Array, " D"],
    w_enc_FD: Float[Array, "F D"],
    b_enc_F: Float[Array, " F"],
    k: int,
    compute: Compute,
) -> tuple[ActiveCodes, Float[Array, "F D"]]:
    """relu of the ``k`` largest entries of each row of ``(x - b_pre) W_enc + b_enc``, and the slot of W_enc."""
    u_BF = by_transposed(x_BD - b_pre_D[None], w_enc_FD, compute.dtype)
    values_BK, latents_BK = largest(u_BF, k, compute, lambda u, pick: u + pick(b_enc_F))
    return ActiveCodes(jax.nn.relu(values_BK), latents_BK), jnp.zeros_like(w_enc_FD)


def _topk_codes_forward(
    x_BD: Array, b_pre_D: Array, w_enc_FD: Array, b_enc_F: Array, k: int, compute: Compute
) -> tuple[tuple[ActiveCodes, Array], tuple[Array, Array, Array, ActiveCodes]]:
    active, slot_FD = topk_codes(x_BD, b_pre_D, w_enc_FD, b_enc_F, k, compute)
    return (active, slot_FD), (x_BD, b_pre_D, w_enc_FD, active)


def _topk_codes_backward(
    k: int, compute: Compute, saved: tuple[Array, Array, Array, ActiveCodes], out: tuple[ActiveCodes, Array]
) -> tuple[Array, Array, Array, Array]:
    (x_BD, b_pre_D, w_enc_FD, active), (to_active, start_FD) = saved, out
    latents = w_enc_FD.shape[0]
    dz_BK = jnp.where(active.values_BK > 0, to_active.values_BK, 0.0)
    dw_enc_FD = _scatter(ActiveCodes(dz_BK, active.latents_BK), x_BD - b_pre_D[None], start_FD, compute)
    db_enc_F = jnp.zeros(latents, jnp.float32).at[active.latents_BK].add(dz_BK)
    # The compiler drops dx where nobody asks for it, as in training.
    dx_BD = _sum(ActiveCodes(dz_BK, active.latents_BK), w_enc_FD, compute)
    return dx_BD, -(db_enc_F @ w_enc_FD), dw_enc_FD, db_enc_F


topk_codes.defvjp(_topk_codes_forward, _topk_codes_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def decode_active(
    active: ActiveCodes, w_dec_FD: Float[Array, "F D"], compute: Compute = PLAIN
) -> tuple[Float[Array, "B D"], Float[Array, "F D"]]:
    """``codes_BF @ w_dec_FD`` of codes given by their active latents, and the slot of W_dec."""
    return _sum(active, w_dec_FD, compute), jnp.zeros_like(w_dec_FD)


def _decode_forward(
    active: ActiveCodes, w_dec_FD: Array, compute: Compute
) -> tuple[tuple[Array, Array], tuple[ActiveCodes, Array]]:
    return decode_active(active, w_dec_FD, compute), (active, w_dec_FD)


def _decode_backward(
    compute: Compute, saved: tuple[ActiveCodes, Array], out: tuple[Array, Array]
) -> tuple[ActiveCodes, Array]:
    (active, w_dec_FD), (out_BD, start_FD) = saved, out
    dvalues_BK = _dot(out_BD, w_dec_FD, active.latents_BK, compute)
    dw_dec_FD = _scatter(active, out_BD, start_FD, compute)
    return ActiveCodes(dvalues_BK, jnp.zeros(active.latents_BK.shape, jax.dtypes.float0)), dw_dec_FD


decode_active.defvjp(_decode_forward, _decode_backward)
