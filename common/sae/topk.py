"""TopK sparse autoencoder with AuxK.

Scaling and evaluating sparse autoencoders. Leo Gao, Tom Dupre la Tour, Henk Tillman, Gabriel Goh, Rajan Troll,
Alec Radford, Ilya Sutskever, Jan Leike, Jeffrey Wu. 2024. https://arxiv.org/abs/2406.04093

    z     = (x - b_pre) W_enc + b_enc            b_pre = b_dec, except for a transcoder: b_pre = 0
    f     = relu(TopK(z, k))
    x_hat = f W_dec + b_dec
    L     = ||x - x_hat||^2 / ||x - mean||^2 + a L_aux       L_aux: see auxk.py

with sums over rows and axes, the mean of the batch, and a = 1/32. Rows of W_dec have unit length. For a transcoder
x_hat and the norms are of the target.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saex_pipe.common.sae.auxk import auxk_loss
from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.contract import DecoderRows, LossTerms, Moment, Params, Variant, variant
from saex_pipe.common.sae.initial import FOR_LARGEST, Initial
from saex_pipe.common.sae.reconstruction import Reconstruction, fit
from saex_pipe.common.sae.schedules import k_now
from saex_pipe.common.sae.sharded import decode_active, dense_codes, rows_active, topk_codes
from saex_pipe.common.sae.sparse import ActiveCodes, Slots


@variant(swept=("auxiliary_coefficient",))
class TopK(Variant):
    """Hyperparameters; the equations are at the head of the file."""

    k: int  # active latents per row
    k_start: int | None = None  # its first value; None: k
    k_fraction: float = 0.1  # share of the steps over which it changes to k, linearly
    auxiliary_coefficient: float = 1 / 32
    k_auxiliary: int | None = None  # dead latents per row in the auxiliary loss; None: half the target's width
    # The auxiliary loss reads every n-th row. With half of 9,216 latents dead, loss and gradients take four times as
    # long as with none at 1 (two cores, B=2048, D=576).
    auxiliary_stride: int = 1
    decoder_rows: DecoderRows = "unit"
    reconstruction: Reconstruction = "variance_normalised"
    initial: Initial = FOR_LARGEST

    def active(
        self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute, k: int | None = None
    ) -> ActiveCodes:
        """The k (None: that of a trained SAE) active latents of each row and their codes, largest first; on a mesh as
        ``sharded.ACTIVE`` says."""
        return self._active(params, x_BD, compute, k or self.k)[0]

    def _active(self, params: Params, x_BD: Array, compute: Compute, k: int) -> tuple[ActiveCodes, Array | None]:
        return topk_codes(x_BD, self.b_pre(params), params["w_enc_FD"], params["b_enc_F"], k, compute)

    def encode(self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute = PLAIN) -> Float[Array, "B F"]:
        """Codes of the rows: k entries per row may be positive, the others are 0."""
        return dense_codes(self.active(params, x_BD, compute), self.latents, compute)

    def reconstruct(
        self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute = PLAIN
    ) -> Float[Array, "B D_out"]:
        """``decode(encode(x))``, by way of the active latents only."""
        return self._decoded(params, x_BD, self.active(params, x_BD, compute), compute)[0]

    def _decoded(
        self, params: Params, x_BD: Array, active: ActiveCodes, compute: Compute
    ) -> tuple[Float[Array, "B D_out"], Array | None]:
        decoded_BD, to_dec_FD = decode_active(active, params["w_dec_FD"], compute)
        return self.with_skip(params, x_BD, decoded_BD + params["b_dec_D"][None], compute), to_dec_FD

    def loss(
        self,
        params: Params,
        x_BD: Float[Array, "B D_in"],
        target_BD: Float[Array, "B D_out"],
        moment: Moment,
        compute: Compute = PLAIN,
    ) -> tuple[Float[Array, ""], LossTerms]:
        """Loss of one batch. ``sparsity_scale`` has nothing to scale here: k fixes the sparsity."""
        active, to_enc_FD = self._active_now(params, x_BD, moment, compute)
        recon_BD, to_dec_FD = self._decoded(params, x_BD, active, compute)
        fitted = fit(self.reconstruction, target_BD, recon_BD)
        auxiliary = self.auxiliary_coefficient * auxk_loss(
            self,
            params,
            x_BD,
            target_BD - recon_BD,
            moment.dead_F,
            compute,
            k=self.k_auxiliary,
            stride=self.auxiliary_stride,
            slots=None if to_enc_FD is None or to_dec_FD is None else Slots(to_enc_FD, to_dec_FD),
        )
        active_F = rows_active(active, self.latents, compute)
        return LossTerms.of(fitted, active_F, x_BD.shape[0], auxiliary=auxiliary)

    def _active_now(
        self, params: Params, x_BD: Array, moment: Moment, compute: Compute
    ) -> tuple[ActiveCodes, Array | None]:
        """The active latents at the k of the moment; those of higher rank have codes of 0."""
        if self.k_start is None or self.k_start == self.k:
            return self._active(params, x_BD, compute, self.k)
        active, slot_FD = self._active(params, x_BD, compute, max(self.k, self.k_start))
        k = jnp.round(k_now(self.k, self.k_start, self.k_fraction, moment.fraction_done)).astype(jnp.int32)
        ordered_BK = jnp.sort(jax.lax.stop_gradient(active.values_BK), axis=1, descending=True)  # on a mesh it is not
        last_B1 = jax.lax.dynamic_slice_in_dim(ordered_BK, k - 1, 1, axis=1)
        return active._replace(values_BK=jnp.where(active.values_BK >= last_B1, active.values_BK, 0.0)), slot_FD

    def published_learning_rate(self) -> float:
        """2e-4 at 2^14 latents, falling with the square root of their number (Gao et al. 2024, section 3)."""
        return 2e-4 / (self.latents / 2**14) ** 0.5
