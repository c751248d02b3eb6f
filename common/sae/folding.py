"""From the units of training to the units of the raw activations, exactly once, on export.

An SAE is trained on scaled rows, x' = c x. There are two equivalent ways to undo that; this one keeps the latents in
their training scale (as SAELens does):

    W_enc <- c_in W_enc      b_enc <- b_enc      W_dec <- W_dec / c_out      b_dec <- b_dec / c_out
"""

import jax.numpy as jnp

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.contract import Params, Variant


def fold(variant: Variant, params: Params, input_scale: float, output_scale: float | None = None) -> Params:
    """Parameters that take raw input and give raw output.

    Args:
        variant: the variant that ``params`` belong to.
        params: as trained, in scaled units.
        input_scale: c_in; the training input was c_in times the raw one. Above 0.
        output_scale: c_out of the target; a transcoder's own, otherwise equal to ``input_scale`` (None).

    Raises:
        InputError: a scale is not above 0, or the two differ although input and target are the same activations.
    """
    output_scale = input_scale if output_scale is None else output_scale
    for name, scale in (("input_scale", input_scale), ("output_scale", output_scale)):
        if not 0 < scale < float("inf"):
            raise InputError(f"{name} = {scale} is not above 0", "check the statistics of the activation store")
    if not variant.transcoder and input_scale != output_scale:
        raise InputError(
            f"input_scale = {input_scale} differs from output_scale = {output_scale}",
            "only a transcoder has two scales",
        )
    return {
        "w_enc_DF": params["w_enc_DF"] * input_scale,
        "b_enc_F": params["b_enc_F"],
        "w_dec_FD": params["w_dec_FD"] / output_scale,
        "b_dec_D": params["b_dec_D"] / output_scale,
    }


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
