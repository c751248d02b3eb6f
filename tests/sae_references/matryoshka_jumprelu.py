"""Bussmann et al. 2025: the JumpReLU loss with a squared error for each of nested dictionaries."""

from functools import partial

import numpy as np

from sae_references import jumprelu

WIDTHS = (5, 20, 32)
SETTINGS = {**jumprelu.SETTINGS, "levels": WIDTHS[:-1]}
codes = jumprelu.codes


def _squared_errors(params, codes_BF, target_BD):
    value, df_BF, dw_FD, db_D = 0, np.zeros_like(codes_BF), np.zeros_like(params["w_dec_FD"]), 0
    for width in (*WIDTHS[:-1], len(dw_FD)):
        error_BD = codes_BF[:, :width] @ params["w_dec_FD"][:width] + params["b_dec_D"] - target_BD
        value += (error_BD**2).sum(axis=1).mean()
        out_BD = 2 * error_BD / len(target_BD)
        df_BF[:, :width] += out_BD @ params["w_dec_FD"][:width].T
        dw_FD[:width] += codes_BF[:, :width].T @ out_BD
        db_D = db_D + out_BD.sum(axis=0)
    return value, df_BF, {"w_dec_FD": dw_FD, "b_dec_D": db_D}


loss = partial(jumprelu.loss, reconstruction=_squared_errors)
gradients = partial(jumprelu.gradients, reconstruction=_squared_errors)
