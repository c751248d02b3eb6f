"""Every SAE variant's equations in float64 NumPy, written from the papers and not from the code.

One module a variant, of the variant's name, with

    SETTINGS                                        hyperparameters to test with, besides latents
    codes(params, x_BD, transcoder)                 the codes [B, F]
    loss(fixed, params, x_BD, target_BD, moment, transcoder)
                                                    the loss at ``params``; what the equations put under a
                                                    stop-gradient is taken at ``fixed``
    gradients(params, x_BD, target_BD, moment, transcoder)
                                                    only where they are not those of ``loss``: straight-through
"""

import numpy as np


def unexplained(error_BD: np.ndarray, of_BD: np.ndarray) -> float:
    return float((error_BD**2).sum() / ((of_BD - of_BD.mean(axis=0)) ** 2).sum())


def kth_largest(z_BF: np.ndarray, k: int) -> np.ndarray:
    return np.sort(z_BF, axis=1)[:, ::-1][:, k - 1 : k]


def decoder_norms(params: dict) -> np.ndarray:
    return np.sqrt((params["w_dec_FD"] ** 2).sum(axis=1))
