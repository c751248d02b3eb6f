"""An SAE that training goes on from: its parameters in the units of this training."""

import numpy as np

from saex_pipe.common import resources
from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.checkpoint import read_any_sae
from saex_pipe.common.sae.contract import Params, Variant, row_norms
from saex_pipe.common.sae.folding import unfold
from saex_pipe.common.sae.normalisation import Normalisers
from saex_pipe.common.sae.saelens import architecture, from_saelens

_MOST_OFF_UNIT = 1e-3  # of decoder rows whose length is constrained, beyond rounding


def imported(uri: str, variant: Variant, like: Params, normalisers: Normalisers) -> Params:
    """The parameters of the SAE at ``uri``. What its layout does not hold (Wright's scales) is left out.

    Args:
        uri: of a folder that SAELens or saex-pipe wrote.
        variant: what is trained.
        like: the shapes of its parameters.
        normalisers: of this training.

    Raises:
        InputError: the SAE is of another variant, shape or kind, or does not keep the variant's constraint.
    """
    saved = read_any_sae(resources.fetch(uri))
    found, params, row_norm = from_saelens(saved.cfg, saved.tensors)
    width_in, width_out = like["w_enc_FD"].shape[1], like["b_dec_D"].shape[0]
    for what, there, here in (
        ("width", params["w_enc_FD"].shape[1], width_in),
        ("width of the target", params["b_dec_D"].shape[0], width_out),
        ("latents", found.latents, variant.latents),
        ("architecture", saved.cfg["architecture"], architecture(variant, same_width=width_in == width_out)),
        ("tap_widths", found.tap_widths, variant.tap_widths),
        ("layer_norm", row_norm, normalisers.input.per_row),
    ):
        if there != here:
            raise InputError(
                f"train.start_from = {uri!r}: its {what} is {there}, that of this training {here}",
                "train with its settings, or start from another SAE",
            )
    if found.subtracts_decoder_bias != variant.subtracts_decoder_bias:
        shift_F = params["w_enc_FD"] @ params["b_dec_D"]
        params = variant.shift_pre_activations(params, -shift_F if found.subtracts_decoder_bias else shift_F)
    params = unfold(variant, params, normalisers)
    _check_constraint(uri, variant, params)
    return {name: leaf for name, leaf in params.items() if name in like}


def _check_constraint(uri: str, variant: Variant, params: Params) -> None:
    if variant.decoder_rows == "free":
        return
    norms_F = np.asarray(row_norms(params["w_dec_FD"]))
    low = 1 - _MOST_OFF_UNIT if variant.decoder_rows == "unit" else 0.0
    if norms_F.min() < low or norms_F.max() > 1 + _MOST_OFF_UNIT:
        raise InputError(
            f"train.start_from = {uri!r}: in units of this training its decoder's rows are {norms_F.min():.3g} to "
            f"{norms_F.max():.3g} long, and train.decoder_rows = {variant.decoder_rows} would change what it computes",
            "set train.decoder_rows to free, or train.normalise to what it was trained with",
        )
