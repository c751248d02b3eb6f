"""Initial parameters."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class DataStats(NamedTuple):
    """Statistics of the training rows, in the (normalised) units the SAE is trained in."""

    input_mean_D: Float[Array, " D_in"]
    target_mean_D: Float[Array, " D_out"]  # equals input_mean_D except for a transcoder


@dataclass(frozen=True, kw_only=True)
class Initial:
    """How the parameters of an SAE start."""

    decoder_norm: float = 1.0  # length of the decoder's rows


def initial_params(
    initial: Initial, key: PRNGKeyArray, latents: int, stats: DataStats, *, centred: bool, skip: bool
) -> dict[str, Array]:
    """Random decoder directions of length ``decoder_norm``, and the encoder their transpose.

    ``b_dec`` starts at the target's mean. Unless the variant subtracts ``b_dec`` from its input (``centred``),
    ``b_enc = -mean W_enc`` centres it. A transcoder's encoder gets directions of its own where the widths differ, and
    its skip path starts at 0.
    """
    decoder_key, encoder_key = jax.random.split(key)
    width_in, width_out = stats.input_mean_D.shape[0], stats.target_mean_D.shape[0]
    w_dec_FD = initial.decoder_norm * _unit_rows(jax.random.normal(decoder_key, (latents, width_out), jnp.float32))
    w_enc_FD = w_dec_FD
    if width_in != width_out:
        w_enc_FD = initial.decoder_norm * _unit_rows(jax.random.normal(encoder_key, (latents, width_in), jnp.float32))
    b_enc_F = jnp.zeros(latents, jnp.float32) if centred else -(w_enc_FD @ stats.input_mean_D)
    params = {
        "w_enc_DF": w_enc_FD.T,
        "b_enc_F": b_enc_F,
        "w_dec_FD": w_dec_FD,
        "b_dec_D": stats.target_mean_D.astype(jnp.float32),
    }
    return params | ({"w_skip_DD": jnp.zeros((width_in, width_out), jnp.float32)} if skip else {})


def _unit_rows(w_FD: Float[Array, "F D"]) -> Float[Array, "F D"]:
    return w_FD / jnp.linalg.norm(w_FD, axis=1, keepdims=True)
