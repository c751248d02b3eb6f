"""Dead latents that start again from inputs which the SAE explains badly.

Towards Monosemanticity: Decomposing Language Models With Dictionary Learning. Trenton Bricken and others. 2023.
https://transformer-circuits.pub/2023/monosemantic-features/index.html#appendix-autoencoder-resampling

Over a large sample of inputs x with errors e = ||target - x_hat||^2, every dead latent i draws one, with a probability
proportional to e^2 and none twice. Then

    W_dec,i = n_dec (target - b_dec) / ||target - b_dec||        W_enc,i = 0.2 n_enc (x - c) / ||x - c||

with n_enc the mean length of the encoder rows of the latents that are alive, and its bias and the moments of the
optimiser 0. As published c = b_dec and n_dec = 1. What is not covered there: n_dec is the mean length of the decoder
rows that are alive (1 where rows are kept at 1); where the encoder does not subtract b_dec from its input, c is the
mean of the sample and the bias is -c W_enc,i, which is the same code; other parameters of a latent (thresholds) start
again as at step 0.

Drawing without replacement, one pass over batches of any number: the rows with the largest log(e^2) + Gumbel noise.
Weighted random sampling with a reservoir. Pavlos S. Efraimidis, Paul G. Spirakis. 2006.
https://doi.org/10.1016/j.ipl.2005.11.003
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.contract import Params, Variant, has_latents
from saex_pipe.common.sae.initial import DataStats, Initial
from saex_pipe.common.sae.rounding import in_float32
from saex_pipe.common.sae.train_step import TrainState

ENCODER_SHARE = 0.2  # of the mean length of encoder rows that are alive
TINY = float(jnp.finfo(jnp.float32).tiny)


class Drawn(NamedTuple):
    """The rows drawn so far, as many as latents, in units of training; the first n are a draw of n."""

    rank_F: Float[Array, " F"]  # log weight and noise, falling; -inf for a place that no row has taken yet
    x_FD: Float[Array, "F D_in"]
    target_FD: Float[Array, "F D_out"]
    means: DataStats  # of all rows that were seen
    batches: Float[Array, ""]  # how many that were, all of one size


def nothing_drawn(params: Params) -> Drawn:
    """Before the first batch."""
    w_enc_FD, w_dec_FD = params["w_enc_FD"], params["w_dec_FD"]
    return Drawn(
        jnp.full(w_dec_FD.shape[0], -jnp.inf, jnp.float32),
        jnp.zeros(w_enc_FD.shape, jnp.float32),
        jnp.zeros(w_dec_FD.shape, jnp.float32),
        DataStats(jnp.zeros(w_enc_FD.shape[1], jnp.float32), jnp.zeros(w_dec_FD.shape[1], jnp.float32)),
        jnp.zeros((), jnp.float32),
    )


def draw(
    variant: Variant,
    state: TrainState,
    drawn: Drawn,
    key: PRNGKeyArray,
    x_BD: Float[Array, "B D_in"],
    target_BD: Float[Array, "B D_out"],
    compute: Compute = PLAIN,
) -> Drawn:
    """``drawn`` after another batch of raw rows; ``key`` is new for every batch."""
    x_BD, target_BD = state.normalisers.input.apply(x_BD), state.normalisers.target.apply(target_BD)
    recon_BD = variant.reconstruct(in_float32(state.params), x_BD, compute)
    error_B = jnp.sum(jnp.square(target_BD - recon_BD), axis=1)
    rank_B = 2 * jnp.log(error_B) + jax.random.gumbel(key, error_B.shape)
    sides = ((drawn.means.input_mean_D, x_BD), (drawn.means.target_mean_D, target_BD))
    rank_F, kept_F = jax.lax.top_k(jnp.concatenate([drawn.rank_F, rank_B]), drawn.rank_F.shape[0])
    return Drawn(
        rank_F,
        jnp.concatenate([drawn.x_FD, x_BD])[kept_F],
        jnp.concatenate([drawn.target_FD, target_BD])[kept_F],
        DataStats(*(mean_D + (jnp.mean(rows_BD, axis=0) - mean_D) / (drawn.batches + 1) for mean_D, rows_BD in sides)),
        drawn.batches + 1,
    )


def revive(variant: Variant, state: TrainState, drawn: Drawn, key: PRNGKeyArray, dead_after_rows: int) -> TrainState:
    """``state`` with the dead latents started again, as many as there are drawn rows for.

    Args:
        variant: of the SAE.
        state: of its training. Its averages of those latents start again, too.
        drawn: by ``draw`` with this state.
        key: of what starts as at step 0.
        dead_after_rows: rows without firing from which on a latent is dead.
    """
    dead_F = state.rows_since_fired_F >= dead_after_rows
    place_F = jnp.maximum(jnp.cumsum(dead_F, dtype=jnp.int32) - 1, 0)  # among the drawn rows, of a dead latent
    revived_F = dead_F & jnp.isfinite(drawn.rank_F[place_F])
    params = in_float32(state.params)
    rows = drawn._replace(x_FD=drawn.x_FD[place_F], target_FD=drawn.target_FD[place_F])
    plain = replace(variant, initial=Initial())  # matrices and biases start as ``_started`` says
    start = plain.init(key, drawn.means) | _started(variant, params, ~dead_F, rows)
    merged = {name: _chosen(name, revived_F, start[name], leaf) for name, leaf in params.items()}
    return state._replace(
        params={name: leaf.astype(state.params[name].dtype) for name, leaf in merged.items()},
        averages={name: _chosen(name, revived_F, merged[name], leaf) for name, leaf in state.averages.items()},
        opt_state=_cleared(state.opt_state, params, revived_F),
        rows_since_fired_F=jnp.where(revived_F, 0, state.rows_since_fired_F),
        frequency_F=jnp.where(revived_F, 0.0, state.frequency_F),
    )


def _started(variant: Variant, params: Params, alive_F: Bool[Array, " F"], rows: Drawn) -> Params:
    """Matrices and biases of latents that start from these rows, one each."""
    centre_D = params["b_dec_D"] if variant.subtracts_decoder_bias else rows.means.input_mean_D

    def mean_length(w_FD: Array) -> Array:
        weight_F = jnp.where(jnp.any(alive_F), alive_F, True).astype(jnp.float32)  # of all if all are dead
        return jnp.sum(weight_F * jnp.linalg.norm(w_FD, axis=1)) / jnp.sum(weight_F)

    w_enc_FD = ENCODER_SHARE * mean_length(params["w_enc_FD"]) * _unit_rows(rows.x_FD - centre_D[None])
    b_enc_F = jnp.zeros_like(params["b_enc_F"]) if variant.subtracts_decoder_bias else -(w_enc_FD @ centre_D)
    biases = {name: b_enc_F for name in params if name.startswith("b_") and has_latents(name)}
    w_dec_FD = mean_length(params["w_dec_FD"]) * _unit_rows(rows.target_FD - params["b_dec_D"][None])
    return biases | {"w_enc_FD": w_enc_FD, "w_dec_FD": w_dec_FD}


def _unit_rows(w_FD: Float[Array, "F D"]) -> Float[Array, "F D"]:
    return w_FD / jnp.maximum(jnp.linalg.norm(w_FD, axis=1, keepdims=True), TINY)


def _chosen(name: str, mask_F: Bool[Array, " F"], new: Array, old: Array) -> Array:
    return jnp.where(_of_rows(mask_F, old.ndim), new, old) if has_latents(name) else old


def _of_rows(mask_F: Bool[Array, " F"], ndim: int) -> Bool[Array, "F ..."]:
    return mask_F.reshape(-1, *[1] * (ndim - 1))


def _cleared(opt_state: Any, params: Params, mask_F: Bool[Array, " F"]) -> Any:
    """Zeros for those latents in whatever an optimiser keeps for a parameter with latents, below the parameter's name.

    What lies there has the parameter's axes (moments, scales of length 1 over others than latents) or one of them (the
    factors of Adafactor), of which the latents' is the one as long as there are latents.
    """

    def clear(path: tuple[Any, ...], leaf: Array) -> Array:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey) and entry.key in params]
        if not names or not has_latents(names[-1]) or leaf.ndim == 0 or leaf.shape[0] != mask_F.shape[0]:
            return leaf
        return jnp.where(_of_rows(mask_F, leaf.ndim), jnp.zeros((), leaf.dtype), leaf)

    return jax.tree_util.tree_map_with_path(clear, opt_state)
