"""The thresholds of a BatchTopK SAE, set once after training so that codes do not depend on the batch they are in.

The usual threshold is an estimate of E[smallest selected code], as a moving average or a mean over batches (Bussmann
and others, https://arxiv.org/abs/2412.06410). Its L0 is not that of training, since batches differ. Moving it until
the mean L0 over many batches is that of training comes to this: with N codes selected in these batches, each batch by
itself, the threshold is the (N + 1)-th largest code of all batches together.

In units of the latents it is theta, or theta / ||W_dec,i|| where latents are compared by codes times row lengths. So it
stands unchanged when a scale is folded into weights (``folding``), where a theta in the compared units would be off by
that scale.
"""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from saex_pipe.common.mesh import DATA, MODEL
from saex_pipe.common.sae.batch_select import largest
from saex_pipe.common.sae.batchtopk import BatchTopK
from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.contract import Params
from saex_pipe.common.sae.sharded import on_each_device


def calibrated(
    variant: BatchTopK,
    params: Params,
    batches: Callable[[], Iterable[Float[Array, "B D_in"]]],
    compute: Compute = PLAIN,
) -> Params:
    """``params`` with the ``threshold_F`` at which the mean L0 over the batches is that of selecting in each of them.

    Args:
        variant: says what is compared, and k.
        params: as trained.
        batches: gives the same normalised rows, float32, at every call, in batches as in training.
        compute: of the codes; on a mesh each device finds the largest of its own, which are gathered.
    """
    kept = 2  # times the codes that training selects: enough unless a batch has more than its share by that factor
    while True:
        found, selected, complete_above = [], 0, 0.0
        for x_BD in batches():
            most = min(kept * variant.k * x_BD.shape[0], x_BD.shape[0] * variant.latents)
            scores_P = np.asarray(_largest_scores(variant, params, x_BD, most, compute))
            positive_P = scores_P[scores_P > 0]
            found.append(positive_P)
            selected += min(variant.k * x_BD.shape[0], len(positive_P))
            if len(positive_P) == most < x_BD.shape[0] * variant.latents:
                complete_above = max(complete_above, float(positive_P.min()))
        scores_N = np.concatenate(found)
        below = len(scores_N) - selected  # scores that must not be above the threshold
        threshold = float(np.partition(scores_N, below - 1)[below - 1]) if below else 0.0
        if threshold >= complete_above:
            break
        kept *= 2
    lengths_F = variant.decoder_norms(params) if variant.rank_by_decoder_norm else jnp.ones(variant.latents)
    return {**params, "threshold_F": threshold / jnp.maximum(lengths_F, jnp.finfo(jnp.float32).tiny)}


@partial(jax.jit, static_argnums=(3, 4))
def _largest_scores(variant: BatchTopK, params: Params, x_BD: Array, most: int, compute: Compute) -> Float[Array, " P"]:
    scores_BF = variant.scores(params, variant.pre_activations(params, x_BD, compute))
    if compute.mesh is None:
        return _largest_of(scores_BF, most)

    def of_all(own_BF: Array) -> Array:
        found_P = _largest_of(own_BF, min(most, own_BF.size))
        for axis in (MODEL, DATA):  # one after the other, so that no more is gathered than one has devices for
            gathered_P = jax.lax.all_gather(found_P, axis, tiled=True)
            found_P = _largest_of(gathered_P[None], min(most, gathered_P.size))
        return found_P

    return on_each_device(compute.mesh, of_all, P(DATA, MODEL), P())(scores_BF)


def _largest_of(scores_BF: Float[Array, "B F"], most: int) -> Float[Array, " P"]:
    places_P, taken_P = largest(scores_BF, most, most)
    return jnp.where(taken_P, scores_BF.reshape(-1)[places_P], 0.0)
