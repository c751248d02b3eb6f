"""From the units of training to the units of the raw activations, exactly once, on export; and back.

An SAE is trained on normalised rows, x' = (x - m) M for both sides; M is diagonal unless rows are whitened. There are
two equivalent ways to undo that; this one keeps the latents in their training scale (as SAELens does):

    W_enc <- M_in W_enc                     b_enc <- b_enc - m_in M_in W_enc, unless b_dec is subtracted from the input
    W_dec <- W_dec M_out^-1                 b_dec <- b_dec M_out^-1 + m_out - m_in W_skip
    W_skip <- M_in W_skip M_out^-1

and what acts on latents (thresholds) stays as it is. Where b_dec is subtracted, x' - b_dec = (x - b_dec') M already.
What clipping did to long rows is not undone: the SAE reads them as they are. Layer norm is no part of the weights:
its rows stay normalised, each tap's part by itself, and who uses the SAE normalises (``inference.Sae``).
"""

import jax.numpy as jnp

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.normalisation import Affine, Normalisers


def fold(variant: Variant, params: Params, normalisers: Normalisers) -> Params:
    """Parameters that take raw input and give raw output.

    Args:
        variant: the variant that ``params`` belong to.
        params: as trained, in units of training.
        normalisers: that brought input and target to those units; equal but for a transcoder.

    Raises:
        InputError: a factor is not above 0, or the two differ although input and target are the same activations.
    """
    _check(variant, normalisers)
    if normalisers.input.per_row:
        return params
    return _moved(variant, params, normalisers.input.affine(), normalisers.target.affine())


def unfold(variant: Variant, params: Params, normalisers: Normalisers) -> Params:
    """Inverse of ``fold``: parameters in the units of training from those that take raw input."""
    _check(variant, normalisers)
    if normalisers.input.per_row:
        return params
    return _moved(variant, params, *(side.affine().inverted() for side in normalisers))


def _moved(variant: Variant, params: Params, on_input: Affine, on_target: Affine) -> Params:
    w_enc_FD = on_input.before(params["w_enc_FD"].T).T
    b_dec_D = on_target.after(params["b_dec_D"][None])[0] + on_target.mean_D
    moved = {**params, "w_enc_FD": w_enc_FD, "w_dec_FD": on_target.after(params["w_dec_FD"]), "b_dec_D": b_dec_D}
    if variant.skip:
        w_skip_DD = on_target.after(on_input.before(params["w_skip_DD"]))
        moved |= {"w_skip_DD": w_skip_DD, "b_dec_D": b_dec_D - on_input.mean_D @ w_skip_DD}
    if variant.subtracts_decoder_bias:
        return moved
    return variant.shift_pre_activations(moved, -(w_enc_FD @ on_input.mean_D))


def _check(variant: Variant, normalisers: Normalisers) -> None:
    for side, normaliser in normalisers._asdict().items():
        if not bool(jnp.all((normaliser.scale_D > 0) & jnp.isfinite(normaliser.scale_D))):
            raise InputError(
                f"a factor of the {side}'s normalisation is not above 0", "check the statistics of the activation store"
            )
    if variant.transcoder:
        if normalisers.input.per_row or normalisers.target.per_row:
            raise InputError(
                "layer_norm takes mean and spread off the target's own row, which a transcoder does not see",
                "normalise a transcoder's rows in another way",
            )
    elif not bool(jnp.array_equal(normalisers.input.scale_D, normalisers.target.scale_D)):
        raise InputError("input and target are normalised differently", "only a transcoder has two normalisations")


def fold_decoder_norms(params: Params) -> Params:
    """Unit decoder rows, their lengths moved into the encoder; same reconstructions, codes times those lengths.

    Only for variants whose activation commutes with a positive scale per latent and does not compare latents
    (relu, not topk).
    """
    norms_F = jnp.linalg.norm(params["w_dec_FD"], axis=1)
    return {
        "w_enc_FD": params["w_enc_FD"] * norms_F[:, None],
        "b_enc_F": params["b_enc_F"] * norms_F,
        # A latent whose row is 0 stays as it is: it has no direction to normalise.
        "w_dec_FD": params["w_dec_FD"] / jnp.where(norms_F > 0, norms_F, 1.0)[:, None],
        "b_dec_D": params["b_dec_D"],
    }
