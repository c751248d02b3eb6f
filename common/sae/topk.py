"""TopK sparse autoencoder with AuxK.

Scaling and evaluating sparse autoencoders. Leo Gao, Tom Dupre la Tour, Henk Tillman, Gabriel Goh, Rajan Troll,
Alec Radford, Ilya Sutskever, Jan Leike, Jeffrey Wu. 2024. https://arxiv.org/abs/2406.04093

    z     = (x - b_pre) W_enc + b_enc            b_pre = b_dec, except for a transcoder: b_pre = 0
    f     = relu(TopK(z, k))
    x_hat = f W_dec + b_dec
    e     = sg(x - x_hat)
    e_hat = TopK(z restricted to dead latents, k_aux) W_dec
    L     = ||x - x_hat||^2 / ||x - mean||^2 + a min(1, dead / k_aux) ||e - e_hat||^2 / ||e - mean(e)||^2

with sums over rows and axes, batch means, sg = no gradient, a = 1/32, k_aux = D/2. Rows of W_dec have unit length.
For a transcoder x_hat, e and the two norms are of the target.
"""

from dataclasses import dataclass
from functools import partial

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
    unit_rows,
    without_parallel,
)
from saex_pipe.common.sae.initial import decoder_transpose
from saex_pipe.common.sae.matmul import matmul
from saex_pipe.common.sae.sparse import ActiveCodes, decode_active, topk_codes

AUXILIARY_STEP = 4  # the sizes for which the auxiliary loss is compiled: k_aux, 4 k_aux, all latents


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Hyperparameters; the equations are at the head of the file."""

    latents: int
    k: int  # active latents per row
    auxiliary_coefficient: float = 1 / 32
    k_auxiliary: int | None = None  # dead latents per row in the auxiliary loss; None: half the target's width
    # The auxiliary loss reads every n-th row. With half of 4,608 latents dead, loss and gradients take five times as
    # long as with none at 1, under twice as long at 8 (two cores, B=2048, D=576).
    auxiliary_stride: int = 1
    transcoder: bool = False

    def init(self, key: PRNGKeyArray, stats: DataStats) -> Params:
        """Random unit decoder rows, encoder their transpose, biases that centre input and output."""
        return decoder_transpose(key, self.latents, stats, decoder_norm=1.0, centred_by_encoder=self.transcoder)

    def active(self, params: Params, x_BD: Float[Array, "B D_in"], compute_dtype: ComputeDtype) -> ActiveCodes:
        """The k active latents of each row and their codes, largest first."""
        b_pre_D = jnp.zeros(x_BD.shape[1], jnp.float32) if self.transcoder else params["b_dec_D"]
        return topk_codes(x_BD, b_pre_D, params["w_enc_DF"], params["b_enc_F"], self.k, compute_dtype)

    def encode(
        self, params: Params, x_BD: Float[Array, "B D_in"], compute_dtype: ComputeDtype = "float32"
    ) -> Float[Array, "B F"]:
        """Codes of the rows: k entries per row may be positive, the others are 0."""
        active = self.active(params, x_BD, compute_dtype)
        codes_BF = jnp.zeros((x_BD.shape[0], self.latents), jnp.float32)
        return jnp.put_along_axis(codes_BF, active.latents_BK, active.values_BK, axis=1, inplace=False)

    def decode(
        self, params: Params, codes_BF: Float[Array, "B F"], compute_dtype: ComputeDtype = "float32"
    ) -> Float[Array, "B D_out"]:
        """Reconstruction from codes."""
        return matmul(codes_BF, params["w_dec_FD"], compute_dtype) + params["b_dec_D"][None]

    def reconstruct(
        self, params: Params, x_BD: Float[Array, "B D_in"], compute_dtype: ComputeDtype = "float32"
    ) -> Float[Array, "B D_out"]:
        """``decode(encode(x))``, by way of the active latents only."""
        return decode_active(self.active(params, x_BD, compute_dtype), params["w_dec_FD"]) + params["b_dec_D"][None]

    def loss(
        self,
        params: Params,
        x_BD: Float[Array, "B D_in"],
        target_BD: Float[Array, "B D_out"],
        dead_F: Bool[Array, " F"],
        compute_dtype: ComputeDtype = "float32",
        sparsity_scale: float | Float[Array, ""] = 1.0,
    ) -> tuple[Float[Array, ""], LossTerms]:
        """Loss of one batch. ``sparsity_scale`` has nothing to scale here: k fixes the sparsity."""
        active = self.active(params, x_BD, compute_dtype)
        recon_BD = decode_active(active, params["w_dec_FD"]) + params["b_dec_D"][None]
        error, variance = squared_error_and_variance(target_BD, recon_BD)
        fvu = ratio_or_zero(error, variance)
        residual_BD = jax.lax.stop_gradient(target_BD - recon_BD)
        every = slice(None, None, self.auxiliary_stride)
        auxiliary = self._auxiliary(params, x_BD[every], residual_BD[every], dead_F, compute_dtype)
        auxiliary *= self.auxiliary_coefficient
        positive_BK = active.values_BK > 0
        total = fvu + auxiliary
        return total, LossTerms(
            total=total,
            reconstruction=fvu,
            sparsity=jnp.zeros((), jnp.float32),
            auxiliary=auxiliary,
            l0=jnp.mean(jnp.sum(positive_BK, axis=1, dtype=jnp.float32)),
            fvu=fvu,
            fired_F=jnp.zeros(self.latents, bool).at[active.latents_BK].max(positive_BK),
        )

    def _auxiliary(
        self, params: Params, x_BD: Array, residual_BD: Array, dead_F: Array, compute_dtype: ComputeDtype
    ) -> Float[Array, ""]:
        k = min(self.k_auxiliary or max(1, residual_BD.shape[1] // 2), self.latents)
        dead_count = jnp.sum(dead_F, dtype=jnp.int32)
        # Work grows with the dead latents: the smallest of a few fixed sizes that holds them all.
        sizes = sorted({k, min(AUXILIARY_STEP * k, self.latents), self.latents})

        def none_dead(_: Params) -> Array:
            return jnp.zeros((), jnp.float32)

        def at_most(size: int, params: Params) -> Array:
            (dead_M,) = jnp.nonzero(dead_F, size=size, fill_value=0)
            is_dead_M = jnp.arange(size, dtype=jnp.int32) < dead_count
            centred_BD = x_BD if self.transcoder else x_BD - params["b_dec_D"][None]
            z_BM = matmul(centred_BD, params["w_enc_DF"][:, dead_M], compute_dtype) + params["b_enc_F"][dead_M][None]
            chosen_BM = jnp.broadcast_to(is_dead_M[None], z_BM.shape)
            if size > k:
                dead_z_BM = jnp.where(chosen_BM, jax.lax.stop_gradient(z_BM), -jnp.inf)
                chosen_BM &= dead_z_BM >= jax.lax.top_k(dead_z_BM, k)[0][:, -1:]
            recon_BD = matmul(jnp.where(chosen_BM, z_BM, 0.0), params["w_dec_FD"][dead_M], compute_dtype)
            error, variance = squared_error_and_variance(residual_BD, recon_BD)
            return jnp.minimum(1.0, dead_count / k) * ratio_or_zero(error, variance)

        branch = jnp.sum(dead_count > jnp.array([0, *sizes[:-1]]), dtype=jnp.int32)
        return jax.lax.switch(branch, [none_dead, *(partial(at_most, size) for size in sizes)], params)

    def project_gradients(self, params: Params, gradients: Params) -> Params:
        """Decoder gradient without the part along each row, which ``constrain`` would undo."""
        return {**gradients, "w_dec_FD": without_parallel(params["w_dec_FD"], gradients["w_dec_FD"])}

    def constrain(self, params: Params) -> Params:
        """Decoder rows back to unit length."""
        return {**params, "w_dec_FD": unit_rows(params["w_dec_FD"])}

    def default_learning_rate(self) -> float:
        """2e-4 at 2^14 latents, falling with the square root of their number (Gao et al. 2024, section 3)."""
        return 2e-4 / (self.latents / 2**14) ** 0.5
