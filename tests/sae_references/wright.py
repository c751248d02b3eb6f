"""Wright and Sharkey 2024: L = ||x - s p W_dec - b_dec||^2 + lambda sum p, with p = relu(z) and s = exp(r)."""

import numpy as np

COEFFICIENT = 0.3
SETTINGS = {"sparsity_coefficient": COEFFICIENT}


def unscaled(params, x_BD, transcoder):
    centred_BD = x_BD - (0 if transcoder else params["b_dec_D"])
    return np.maximum(centred_BD @ params["w_enc_FD"].T + params["b_enc_F"], 0)


def codes(params, x_BD, transcoder):
    return np.exp(params["r_scale_F"]) * unscaled(params, x_BD, transcoder)


def loss(fixed, params, x_BD, target_BD, moment, transcoder):
    error_BD = target_BD - codes(params, x_BD, transcoder) @ params["w_dec_FD"] - params["b_dec_D"]
    penalty_B = unscaled(params, x_BD, transcoder).sum(axis=1)
    return float((error_BD**2).sum(axis=1).mean() + COEFFICIENT * float(moment.sparsity_scale) * penalty_B.mean())
