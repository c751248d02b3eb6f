"""JumpReLU in the three forms of Rajamanoharan et al. 2024, Anthropic (January 2025) and Gemma Scope 2."""

import numpy as np

from sae_references import decoder_norms

COEFFICIENT, BANDWIDTH, SCALE, PULL, TARGET, FREQUENCY, LIMIT = 0.3, 0.4, 1.5, 0.05, 9.0, 0.7, 0.2
SETTINGS = {
    "sparsity_coefficient": COEFFICIENT,
    "bandwidth": BANDWIDTH,
    "threshold_start": 0.6,
    "tanh_scale": SCALE,
    "pre_activation_coefficient": PULL,
    "target_l0": TARGET,
    "frequency_coefficient": FREQUENCY,
    "frequency_limit": LIMIT,
}


def pre_activations(params, x_BD, centred):
    return (x_BD - (params["b_dec_D"] if centred else 0)) @ params["w_enc_FD"].T + params["b_enc_F"]


def codes(params, x_BD, transcoder, form="tanh"):
    z_BF = pre_activations(params, x_BD, form != "tanh" and not transcoder)
    return z_BF * (z_BF > np.maximum(params["threshold_F"], 0))


def _squared_error(params, codes_BF, target_BD):
    """Value, gradient by the codes and by the decoder's parameters."""
    error_BD = codes_BF @ params["w_dec_FD"] + params["b_dec_D"] - target_BD
    out_BD = 2 * error_BD / len(target_BD)
    value = (error_BD**2).sum(axis=1).mean()
    return value, out_BD @ params["w_dec_FD"].T, {"w_dec_FD": codes_BF.T @ out_BD, "b_dec_D": out_BD.sum(axis=0)}


def loss(fixed, params, x_BD, target_BD, moment, transcoder, form="tanh", reconstruction=_squared_error):
    z_BF = pre_activations(params, x_BD, form != "tanh" and not transcoder)
    on_BF = z_BF > params["threshold_F"]
    norms_F, weight = decoder_norms(params), COEFFICIENT * float(moment.sparsity_scale)
    value = reconstruction(params, z_BF * on_BF, target_BD)[0]
    if form == "tanh":
        below_BF = np.maximum(params["threshold_F"] - z_BF, 0) * norms_F * np.asarray(moment.dead_F)
        penalty_B = np.tanh(SCALE * z_BF * on_BF * norms_F).sum(axis=1)
        return float(value + weight * penalty_B.mean() + PULL * below_BF.sum(axis=1).mean())
    l0, share_F = on_BF.sum(axis=1).mean(), on_BF.mean(axis=0)
    if form == "l0":
        return float(value + weight * l0)
    return float(value + weight * ((l0 / TARGET - 1) ** 2 + FREQUENCY * np.maximum(share_F - LIMIT, 0).sum()))


def gradients(params, x_BD, target_BD, moment, transcoder, form="tanh", reconstruction=_squared_error):
    rows, centred = len(x_BD), form != "tanh" and not transcoder
    z_BF, theta_F, dead_F = pre_activations(params, x_BD, centred), params["threshold_F"], np.asarray(moment.dead_F)
    on_BF, near_BF = z_BF > theta_F, np.abs(z_BF - theta_F) < BANDWIDTH / 2
    codes_BF, norms_F = z_BF * on_BF, decoder_norms(params)
    weight = COEFFICIENT * float(moment.sparsity_scale) / rows
    _, df_BF, found = reconstruction(params, codes_BF, target_BD)
    dn_F, dstep_BF = np.zeros_like(norms_F), np.zeros_like(z_BF)
    pulled_BF = np.zeros_like(z_BF)
    if form == "tanh":
        slope_BF = weight * SCALE * (1 - np.tanh(SCALE * codes_BF * norms_F) ** 2)
        df_BF = df_BF + slope_BF * norms_F
        pulled_BF = PULL / rows * norms_F * (dead_F & (z_BF < theta_F))
        dn_F = (slope_BF * codes_BF).sum(axis=0) + (pulled_BF / norms_F * (theta_F - z_BF)).sum(axis=0)
    elif form == "l0":
        dstep_BF = dstep_BF + weight
    else:
        of_l0 = 2 * (on_BF.sum(axis=1).mean() / TARGET - 1) / TARGET
        dstep_BF = weight * (of_l0 + FREQUENCY * (on_BF.mean(axis=0) > LIMIT)) + dstep_BF
    jump_BF, step_BF = theta_F / BANDWIDTH * near_BF * df_BF, near_BF / BANDWIDTH * dstep_BF
    dz_BF = df_BF * on_BF - pulled_BF + (jump_BF if form == "tanh" else 0)
    found["threshold_F"] = (pulled_BF - jump_BF - step_BF).sum(axis=0)
    found["w_dec_FD"] = found["w_dec_FD"] + (dn_F / norms_F)[:, None] * params["w_dec_FD"]
    found["b_enc_F"] = dz_BF.sum(axis=0)
    found["w_enc_FD"] = dz_BF.T @ (x_BD - (params["b_dec_D"] if centred else 0))
    if centred:
        found["b_dec_D"] = found["b_dec_D"] - found["b_enc_F"] @ params["w_enc_FD"]
    return found
