"""Anthropic's April update: L = ||x - x_hat||^2 + lambda sum f ||W_dec||."""

import numpy as np

from sae_references import decoder_norms

COEFFICIENT = 0.3
SETTINGS = {"sparsity_coefficient": COEFFICIENT}


def codes(params, x_BD, transcoder):
    return np.maximum(x_BD @ params["w_enc_FD"].T + params["b_enc_F"], 0)


def loss(fixed, params, x_BD, target_BD, moment, transcoder):
    codes_BF = codes(params, x_BD, transcoder)
    error_BD = target_BD - codes_BF @ params["w_dec_FD"] - params["b_dec_D"]
    penalty_B = codes_BF @ decoder_norms(params)
    return float((error_BD**2).sum(axis=1).mean() + COEFFICIENT * float(moment.sparsity_scale) * penalty_B.mean())
