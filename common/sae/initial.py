"""Initial parameters."""

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from saex_pipe.common.sae.contract import DataStats, Params, unit_rows


def decoder_transpose(
    key: PRNGKeyArray, latents: int, stats: DataStats, decoder_norm: float, centred_by_encoder: bool
) -> Params:
    """Random decoder directions of length ``decoder_norm``, and the encoder their transpose.

    ``b_dec`` starts at the target's mean. ``centred_by_encoder`` is for variants that do not subtract ``b_dec``
    from the input: there ``b_enc = -mean W_enc`` centres it. A transcoder's encoder gets directions of its own
    where the widths differ.
    """
    decoder_key, encoder_key = jax.random.split(key)
    width_in, width_out = stats.input_mean_D.shape[0], stats.target_mean_D.shape[0]
    w_dec_FD = decoder_norm * unit_rows(jax.random.normal(decoder_key, (latents, width_out), jnp.float32))
    w_enc_FD = w_dec_FD
    if width_in != width_out:
        w_enc_FD = decoder_norm * unit_rows(jax.random.normal(encoder_key, (latents, width_in), jnp.float32))
    b_enc_F = -(w_enc_FD @ stats.input_mean_D) if centred_by_encoder else jnp.zeros(latents, jnp.float32)
    return {
        "w_enc_DF": w_enc_FD.T,
        "b_enc_F": b_enc_F,
        "w_dec_FD": w_dec_FD,
        "b_dec_D": stats.target_mean_D.astype(jnp.float32),
    }
