"""Karvonen et al. 2024: L = ||x - x_hat||^2 + lambda sg(sum f / sum f^p) sum f^p."""

import numpy as np

COEFFICIENT, P_END, START = 0.3, 0.6, 0.25
SETTINGS = {"sparsity_coefficient": COEFFICIENT, "p_end": P_END, "anneal_start": START}


def codes(params, x_BD, transcoder):
    centred_BD = x_BD - (0 if transcoder else params["b_dec_D"])
    return np.maximum(centred_BD @ params["w_enc_FD"].T + params["b_enc_F"], 0)


def exponent(fraction_done):
    return 1 - (1 - P_END) * max(0.0, fraction_done - START) / (1 - START)


def loss(fixed, params, x_BD, target_BD, moment, transcoder):
    codes_BF, fixed_BF = (codes(of, x_BD, transcoder) for of in (params, fixed))
    error_BD = target_BD - codes_BF @ params["w_dec_FD"] - params["b_dec_D"]
    p = exponent(float(moment.fraction_done))
    penalty = (codes_BF**p).sum(axis=1).mean() * fixed_BF.sum() / (fixed_BF**p).sum()
    return float((error_BD**2).sum(axis=1).mean() + COEFFICIENT * float(moment.sparsity_scale) * penalty)
