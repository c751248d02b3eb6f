"""Bussmann et al. 2024: the k B largest codes of a batch in training, thresholds after it; AuxK as Gao et al. 2024."""

import numpy as np

from sae_references import kth_largest, unexplained

K = 3
SETTINGS = {"k": K}


def _z(params, x_BD, transcoder):
    return (x_BD - (0 if transcoder else params["b_dec_D"])) @ params["w_enc_FD"].T + params["b_enc_F"]


def codes(params, x_BD, transcoder):
    z_BF = _z(params, x_BD, transcoder)
    return z_BF * (z_BF > np.maximum(params["threshold_F"], 0))


def training_codes(params, x_BD, transcoder, k=K):
    relu_BF = np.maximum(_z(params, x_BD, transcoder), 0)
    last = np.sort(relu_BF, axis=None)[-k * len(x_BD)]
    return relu_BF * (relu_BF >= last)


def loss(fixed, params, x_BD, target_BD, moment, transcoder, widths=(None,)):
    codes_BF, total = training_codes(params, x_BD, transcoder), 0
    for width in widths:
        recon_BD = codes_BF[:, :width] @ params["w_dec_FD"][:width] + params["b_dec_D"]
        total += unexplained(target_BD - recon_BD, target_BD)
    dead_F, k_auxiliary = np.asarray(moment.dead_F), target_BD.shape[1] // 2
    dead = int(dead_F.sum())
    if dead:
        residual_BD = target_BD - fixed["b_dec_D"] - training_codes(fixed, x_BD, transcoder) @ fixed["w_dec_FD"]
        z_BM = _z(params, x_BD, transcoder)[:, dead_F]
        codes_BM = z_BM * (z_BM >= kth_largest(z_BM, min(k_auxiliary, dead)))
        left = unexplained(residual_BD - codes_BM @ params["w_dec_FD"][dead_F], residual_BD)
        total += min(1, dead / k_auxiliary) * left / 32
    return total
