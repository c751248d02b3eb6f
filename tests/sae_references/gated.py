"""Rajamanoharan et al. 2024: a gate, a magnitude, and an auxiliary reconstruction by the gate."""

import numpy as np

COEFFICIENT = 0.3
SETTINGS = {"sparsity_coefficient": COEFFICIENT}


def _gate(params, x_BD, transcoder):
    product_BF = (x_BD - (0 if transcoder else params["b_dec_D"])) @ params["w_enc_FD"].T
    return product_BF, product_BF + params["b_enc_F"]


def codes(params, x_BD, transcoder):
    product_BF, gate_BF = _gate(params, x_BD, transcoder)
    return (gate_BF > 0) * np.maximum(product_BF * np.exp(params["r_mag_F"]) + params["b_mag_F"], 0)


def loss(fixed, params, x_BD, target_BD, moment, transcoder):
    error_BD = target_BD - codes(params, x_BD, transcoder) @ params["w_dec_FD"] - params["b_dec_D"]
    opened_BF = np.maximum(_gate(params, x_BD, transcoder)[1], 0)
    auxiliary_BD = target_BD - opened_BF @ fixed["w_dec_FD"] - fixed["b_dec_D"]
    squares_B = (error_BD**2).sum(axis=1) + (auxiliary_BD**2).sum(axis=1)
    return float((squares_B + COEFFICIENT * float(moment.sparsity_scale) * opened_BF.sum(axis=1)).mean())
