"""From the units of training to the units of the raw activations, exactly once, on export.

An SAE is trained on scaled rows, x' = c x, with a factor c for every dimension. There are two equivalent ways to undo
that; this one keeps the latents in their training scale (as SAELens does):

    W_enc <- c_in W_enc      W_dec <- W_dec / c_out      b_dec <- b_dec / c_out      W_skip <- c_in W_skip / c_out

and what acts on latents (b_enc, thresholds) stays as it is.
"""

import jax.numpy as jnp

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.normalisation import Normalisers


def fold(variant: Variant, params: Params, normalisers: Normalisers) -> Params:
    """Parameters that take raw input and give raw output.

    Args:
        variant: the variant that ``params`` belong to.
        params: as trained, in scaled units.
        normalisers: that brought input and target to those units; equal but for a transcoder.

    Raises:
        InputError: a factor is not above 0, or the two differ although input and target are the same activations.
    """
    in_D, out_D = normalisers.input.scale_D, normalisers.target.scale_D
    for side, scale_D in zip(("input", "target"), (in_D, out_D), strict=True):
        if not bool(jnp.all((scale_D > 0) & jnp.isfinite(scale_D))):
            raise InputError(
                f"a factor of the {side}'s normalisation is not above 0", "check the statistics of the activation store"
            )
    if not variant.transcoder and not bool(jnp.array_equal(in_D, out_D)):
        raise InputError("input and target are normalised differently", "only a transcoder has two normalisations")
    folded = {
        **params,
        "w_enc_DF": params["w_enc_DF"] * in_D[:, None],
        "w_dec_FD": params["w_dec_FD"] / out_D[None],
        "b_dec_D": params["b_dec_D"] / out_D,
    }
    if variant.skip:
        folded["w_skip_DD"] = params["w_skip_DD"] * in_D[:, None] / out_D[None]
    return folded


def fold_decoder_norms(params: Params) -> Params:
    """Unit decoder rows, their lengths moved into the encoder; same reconstructions, codes times those lengths.

    Only for variants whose activation commutes with a positive scale per latent and does not compare latents
    (relu, not topk).
    """
    norms_F = jnp.linalg.norm(params["w_dec_FD"], axis=1)
    return {
        "w_enc_DF": params["w_enc_DF"] * norms_F[None],
        "b_enc_F": params["b_enc_F"] * norms_F,
        # A latent whose row is 0 stays as it is: it has no direction to normalise.
        "w_dec_FD": params["w_dec_FD"] / jnp.where(norms_F > 0, norms_F, 1.0)[:, None],
        "b_dec_D": params["b_dec_D"],
    }
