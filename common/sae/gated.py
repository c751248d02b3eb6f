"""Gated sparse autoencoder: one path decides which latents are active, another how strongly.

Improving dictionary learning with gated sparse autoencoders. Senthooran Rajamanoharan, Arthur Conmy, Lewis Smith,
Tom Lieberum, Vikrant Varma, Janos Kramar, Rohin Shah, Neel Nanda. 2024. https://arxiv.org/abs/2404.16014

    u     = (x - b_pre) W_enc
    pi    = u + b_gate
    f     = 1[pi > 0] relu(u exp(r_mag) + b_mag)
    x_hat = f W_dec + b_dec                                        ||W_dec,i|| = 1
    L     = ||x - x_hat||^2 + lambda sum_i relu(pi_i) + ||x - (relu(pi) sg(W_dec) + sg(b_dec))||^2

as a mean over rows and a sum over axes; sg = no gradient. The step 1[pi > 0] has none either: the gate learns from the
last term alone, and that term must not bend the decoder, whose codes are others. ``b_enc_F`` is b_gate. For a
transcoder x_hat and the norms are of the target, and a skip path is held constant in the last term.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from saex_pipe.common.sae import few
from saex_pipe.common.sae.batch_sums import scaled, shifted
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import DecoderRows, Params, variant
from saex_pipe.common.sae.dense import SWEPT_WITH_PENALTY, Activations, Penalised
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.reconstruction import fit


@variant(swept=SWEPT_WITH_PENALTY)
class Gated(Penalised):
    """Hyperparameters; the equations are at the head of the file."""

    decoder_rows: DecoderRows = "unit"

    def init(self, key: PRNGKeyArray, stats: DataStats) -> Params:
        """Both paths start equal."""
        params = super().init(key, stats)
        return {**params, "r_mag_F": jnp.zeros(self.latents, jnp.float32), "b_mag_F": jnp.copy(params["b_enc_F"])}

    def shift_pre_activations(self, params: Params, shift_F: Float[Array, " F"]) -> Params:
        """On both paths."""
        b_mag_F = params["b_mag_F"] + shift_F * jnp.exp(params["r_mag_F"])
        return {**super().shift_pre_activations(params, shift_F), "b_mag_F": b_mag_F}

    def activations(self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute) -> Activations:
        """Penalised is relu(pi)."""
        u_BF = few.encoded(x_BD, self.b_pre(params), params["w_enc_FD"], compute)
        gate_BF = shifted(u_BF, params["b_enc_F"])
        magnitude_BF = jax.nn.relu(shifted(scaled(u_BF, jnp.exp(params["r_mag_F"])), params["b_mag_F"]))
        return Activations(gate_BF, jax.nn.relu(gate_BF), jnp.where(gate_BF > 0, magnitude_BF, 0.0))

    def further_loss(
        self,
        params: Params,
        found: Activations,
        x_BD: Float[Array, "B D_in"],
        target_BD: Float[Array, "B D_out"],
        compute: Compute,
    ) -> Float[Array, ""]:
        """How well the gate alone would reconstruct through a decoder that is held constant."""
        held = jax.lax.stop_gradient(params)
        recon_BD = self.with_skip(held, x_BD, self.decode_few(held, found.penalised_BF, compute, held=True), compute)
        return fit(self.reconstruction, target_BD, recon_BD).loss
