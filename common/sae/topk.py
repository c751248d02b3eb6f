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

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.contract import DecoderRows, LossTerms, Moment, Params, Variant, variant
from saex_pipe.common.sae.matmul import matmul
from saex_pipe.common.sae.reconstruction import Reconstruction, fit, ratio_or_zero, squared_error_and_variance
from saex_pipe.common.sae.sparse import ActiveCodes, decode_active, topk_codes

AUXILIARY_STEP = 4  # the sizes for which the auxiliary loss is compiled: k_aux, 4 k_aux, all latents


@variant(swept=("auxiliary_coefficient",))
class TopK(Variant):
    """Hyperparameters; the equations are at the head of the file."""

    k: int  # active latents per row
    auxiliary_coefficient: float = 1 / 32
    k_auxiliary: int | None = None  # dead latents per row in the auxiliary loss; None: half the target's width
    # The auxiliary loss reads every n-th row. With half of 4,608 latents dead, loss and gradients take five times as
    # long as with none at 1, under twice as long at 8 (two cores, B=2048, D=576).
    auxiliary_stride: int = 1
    decoder_rows: DecoderRows = "unit"
    reconstruction: Reconstruction = "variance_normalised"

    def active(self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute) -> ActiveCodes:
        """The k active latents of each row and their codes, largest first."""
        b_pre_D = params["b_dec_D"] if self.subtracts_decoder_bias else jnp.zeros(x_BD.shape[1], jnp.float32)
        return topk_codes(x_BD, b_pre_D, params["w_enc_DF"], params["b_enc_F"], self.k, compute.dtype)

    def encode(self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute = PLAIN) -> Float[Array, "B F"]:
        """Codes of the rows: k entries per row may be positive, the others are 0."""
        active = self.active(params, x_BD, compute)
        codes_BF = jnp.zeros((x_BD.shape[0], self.latents), jnp.float32)
        return jnp.put_along_axis(codes_BF, active.latents_BK, active.values_BK, axis=1, inplace=False)

    def reconstruct(
        self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute = PLAIN
    ) -> Float[Array, "B D_out"]:
        """``decode(encode(x))``, by way of the active latents only."""
        return self._decoded(params, x_BD, self.active(params, x_BD, compute), compute)

    def _decoded(self, params: Params, x_BD: Array, active: ActiveCodes, compute: Compute) -> Float[Array, "B D_out"]:
        recon_BD = decode_active(active, params["w_dec_FD"]) + params["b_dec_D"][None]
        return self.with_skip(params, x_BD, recon_BD, compute)

    def loss(
        self,
        params: Params,
        x_BD: Float[Array, "B D_in"],
        target_BD: Float[Array, "B D_out"],
        moment: Moment,
        compute: Compute = PLAIN,
    ) -> tuple[Float[Array, ""], LossTerms]:
        """Loss of one batch. ``sparsity_scale`` has nothing to scale here: k fixes the sparsity."""
        active = self.active(params, x_BD, compute)
        recon_BD = self._decoded(params, x_BD, active, compute)
        fitted = fit(self.reconstruction, target_BD, recon_BD)
        residual_BD = jax.lax.stop_gradient(target_BD - recon_BD)
        every = slice(None, None, self.auxiliary_stride)
        auxiliary = self._auxiliary(params, x_BD[every], residual_BD[every], moment.dead_F, compute)
        auxiliary *= self.auxiliary_coefficient
        positive_BK = active.values_BK > 0
        total = fitted.loss + auxiliary
        return total, LossTerms(
            total=total,
            reconstruction=fitted.loss,
            sparsity=jnp.zeros((), jnp.float32),
            auxiliary=auxiliary,
            l0=jnp.mean(jnp.sum(positive_BK, axis=1, dtype=jnp.float32)),
            fvu=fitted.fvu,
            active_F=jnp.zeros(self.latents, jnp.int32).at[active.latents_BK].add(positive_BK.astype(jnp.int32)),
        )

    def _auxiliary(
        self, params: Params, x_BD: Array, residual_BD: Array, dead_F: Array, compute: Compute
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
            centred_BD = self.centre(params, x_BD)
            z_BM = matmul(centred_BD, params["w_enc_DF"][:, dead_M], compute.dtype) + params["b_enc_F"][dead_M][None]
            chosen_BM = jnp.broadcast_to(is_dead_M[None], z_BM.shape)
            if size > k:
                dead_z_BM = jnp.where(chosen_BM, jax.lax.stop_gradient(z_BM), -jnp.inf)
                chosen_BM &= dead_z_BM >= jax.lax.top_k(dead_z_BM, k)[0][:, -1:]
            recon_BD = matmul(jnp.where(chosen_BM, z_BM, 0.0), params["w_dec_FD"][dead_M], compute.dtype)
            error, variance = squared_error_and_variance(residual_BD, recon_BD)
            return jnp.minimum(1.0, dead_count / k) * ratio_or_zero(error, variance)

        branch = jnp.sum(dead_count > jnp.array([0, *sizes[:-1]]), dtype=jnp.int32)
        return jax.lax.switch(branch, [none_dead, *(partial(at_most, size) for size in sizes)], params)

    def default_learning_rate(self) -> float:
        """2e-4 at 2^14 latents, falling with the square root of their number (Gao et al. 2024, section 3)."""
        return 2e-4 / (self.latents / 2**14) ** 0.5
