"""Gao et al. 2024: TopK with AuxK."""

import numpy as np

from sae_references import kth_largest, unexplained

K = 4
SETTINGS = {"k": K}


def _z(params, x_BD, transcoder):
    return (x_BD - (0 if transcoder else params["b_dec_D"])) @ params["w_enc_FD"].T + params["b_enc_F"]


def codes(params, x_BD, transcoder):
    z_BF = _z(params, x_BD, transcoder)
    return np.maximum(z_BF, 0) * (z_BF >= kth_largest(z_BF, K))


def loss(fixed, params, x_BD, target_BD, moment, transcoder):
    error_BD = target_BD - codes(params, x_BD, transcoder) @ params["w_dec_FD"] - params["b_dec_D"]
    dead_F = np.asarray(moment.dead_F)
    total, dead, k_auxiliary = unexplained(error_BD, target_BD), int(dead_F.sum()), target_BD.shape[1] // 2
    if dead:
        residual_BD = target_BD - fixed["b_dec_D"] - codes(fixed, x_BD, transcoder) @ fixed["w_dec_FD"]
        z_BM = _z(params, x_BD, transcoder)[:, dead_F]
        codes_BM = z_BM * (z_BM >= kth_largest(z_BM, min(k_auxiliary, dead)))
        left = unexplained(residual_BD - codes_BM @ params["w_dec_FD"][dead_F], residual_BD)
        total += min(1, dead / k_auxiliary) * left / 32
    return total
