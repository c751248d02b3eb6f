"""Reconstructions of nested dictionaries, at the cost of the largest.

Level g decodes the first m_g latents. The reconstructions of all levels are running sums over the groups of latents
between two levels, so that every latent is decoded once:

    x_hat_g = x_hat_{g-1} + f_{m_{g-1} .. m_g} W_dec,{m_{g-1} .. m_g}
"""

from collections.abc import Sequence
from itertools import accumulate

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from saex_pipe.common.sae import few
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.pairs import Pairs, decoded
from saex_pipe.common.sae.reconstruction import Fit, Reconstruction, fit


def decode_nested(
    codes_BF: Float[Array, "B F"],
    w_dec_FD: Float[Array, "F D"],
    widths: Sequence[int],
    compute: Compute,
    *,
    wanted_BF: Bool[Array, "B F"] | None = None,
) -> list[Float[Array, "B D"]]:
    """Reconstructions by the first ``width`` latents, without bias, for each of the ascending ``widths``.

    The last width is that of all latents. Codes that are 0 get a gradient where they are ``wanted``, as in
    ``few.decoded``.
    """
    if widths[-1] != w_dec_FD.shape[0]:
        raise ValueError(f"the widest of the levels {widths} is not all {w_dec_FD.shape[0]} latents")
    groups_GBD = few.decoded_groups(codes_BF, w_dec_FD, tuple(widths[:-1]), compute, wanted_BF=wanted_BF)
    return _running_sums(list(groups_GBD))


def decode_nested_pairs(
    pairs: Pairs, w_dec_FD: Float[Array, "F D"], widths: Sequence[int], rows: int
) -> tuple[list[Float[Array, "B D"]], Float[Array, "F D"]]:
    """The same of codes given by their pairs, and the slot of W_dec; ``rows`` is B."""
    # A row of the product for each group and batch row.
    group_P = jnp.sum(pairs.latents_P[None] >= jnp.array(widths, jnp.int32)[:, None], axis=0, dtype=jnp.int32)
    product, slot_FD = decoded(pairs._replace(rows_P=group_P * rows + pairs.rows_P), w_dec_FD, len(widths) * rows)
    groups = [product[start : start + rows] for start in range(0, len(widths) * rows, rows)]
    return _running_sums(groups), slot_FD


def _running_sums(groups: list[Float[Array, "B D"]]) -> list[Float[Array, "B D"]]:
    return list(accumulate(groups, jnp.add))


def with_bias(
    variant: Variant,
    params: Params,
    x_BD: Float[Array, "B D_in"],
    levels: Sequence[Float[Array, "B D_out"]],
    compute: Compute,
) -> list[Float[Array, "B D_out"]]:
    """The levels with the decoder's bias and the skip path, which are the same for all."""
    bias_BD = jnp.broadcast_to(params["b_dec_D"][None], levels[0].shape)
    bias_BD = variant.with_skip(params, x_BD, bias_BD, compute)
    return [recon_BD + bias_BD for recon_BD in levels]


def fit_nested(kind: Reconstruction, target_BD: Float[Array, "B D"], levels: Sequence[Float[Array, "B D"]]) -> Fit:
    """The sum of the losses of all levels, once; the unexplained variance of the last, which is the whole SAE."""
    fits = [fit(kind, target_BD, recon_BD) for recon_BD in levels]
    return Fit(sum((each.loss for each in fits[1:]), start=fits[0].loss), fits[-1].fvu)
