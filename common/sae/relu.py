"""ReLU sparse autoencoder with an L1 penalty weighted by decoder norms.

Circuits Updates, April 2024: "Update on how we train SAEs". Tom Conerly, Adly Templeton, Trenton Bricken,
Jonathan Marcus, Tom Henighan.
https://transformer-circuits.pub/2024/april-update/index.html#training-saes

    f     = relu(x W_enc + b_enc)
    x_hat = f W_dec + b_dec
    L     = ||x - x_hat||^2 + lambda sum_i f_i ||W_dec,i||

as a mean over rows and a sum over axes, for inputs scaled to a mean norm of sqrt(D); there lambda is about 5 and rises
linearly over the first 5 % of the steps. The decoder is not constrained: weighting by its norms removes the incentive
to shrink codes and grow rows.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from saex_pipe.common.sae.contract import (
    ComputeDtype,
    DataStats,
    LossTerms,
    Params,
    ratio_or_zero,
    squared_error_and_variance,
)
from saex_pipe.common.sae.initial import decoder_transpose
from saex_pipe.common.sae.matmul import matmul


@dataclass(frozen=True, kw_only=True)
class Relu:
    """Hyperparameters; the equations are at the head of the file."""

    latents: int
    sparsity_coefficient: float  # lambda
    decoder_norm: float = 0.1  # length of the decoder rows at the start
    transcoder: bool = False

    def init(self, key: PRNGKeyArray, stats: DataStats) -> Params:
        """Random decoder rows, encoder their transpose, biases that centre input and output.

        The update starts its biases at 0; starting them at the mean spares the first steps of learning it.
        """
        return decoder_transpose(key, self.latents, stats, self.decoder_norm, centred_by_encoder=True)

    def encode(
        self, params: Params, x_BD: Float[Array, "B D_in"], compute_dtype: ComputeDtype = "float32"
    ) -> Float[Array, "B F"]:
        """Codes of the rows."""
        return jax.nn.relu(matmul(x_BD, params["w_enc_DF"], compute_dtype) + params["b_enc_F"][None])

    def decode(
        self, params: Params, codes_BF: Float[Array, "B F"], compute_dtype: ComputeDtype = "float32"
    ) -> Float[Array, "B D_out"]:
        """Reconstruction from codes."""
        return matmul(codes_BF, params["w_dec_FD"], compute_dtype) + params["b_dec_D"][None]

    def reconstruct(
        self, params: Params, x_BD: Float[Array, "B D_in"], compute_dtype: ComputeDtype = "float32"
    ) -> Float[Array, "B D_out"]:
        """``decode(encode(x))``."""
        return self.decode(params, self.encode(params, x_BD, compute_dtype), compute_dtype)

    def loss(
        self,
        params: Params,
        x_BD: Float[Array, "B D_in"],
        target_BD: Float[Array, "B D_out"],
        dead_F: Bool[Array, " F"],
        compute_dtype: ComputeDtype = "float32",
        sparsity_scale: float | Float[Array, ""] = 1.0,
    ) -> tuple[Float[Array, ""], LossTerms]:
        """Loss of one batch. Dead latents are left alone: the update has no remedy for them."""
        rows = x_BD.shape[0]
        codes_BF = self.encode(params, x_BD, compute_dtype)
        recon_BD = self.decode(params, codes_BF, compute_dtype)
        error, variance = squared_error_and_variance(target_BD, recon_BD)
        norms_F = jnp.linalg.norm(params["w_dec_FD"], axis=1)
        sparsity = sparsity_scale * self.sparsity_coefficient * jnp.dot(jnp.sum(codes_BF, axis=0), norms_F) / rows
        active_F = jnp.sum(codes_BF > 0, axis=0, dtype=jnp.int32)
        total = error / rows + sparsity
        return total, LossTerms(
            total=total,
            reconstruction=error / rows,
            sparsity=sparsity,
            auxiliary=jnp.zeros((), jnp.float32),
            l0=jnp.sum(active_F).astype(jnp.float32) / rows,
            fvu=ratio_or_zero(error, variance),
            fired_F=active_F > 0,
        )

    def project_gradients(self, params: Params, gradients: Params) -> Params:
        """The gradients: there is no constraint."""
        return gradients

    def constrain(self, params: Params) -> Params:
        """The parameters: there is no constraint."""
        return params

    def default_learning_rate(self) -> float:
        """5e-5, the update's value, at every number of latents."""
        return 5e-5
