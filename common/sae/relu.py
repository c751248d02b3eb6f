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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.contract import LossTerms, Moment, Params, Variant, variant
from saex_pipe.common.sae.initial import Initial
from saex_pipe.common.sae.reconstruction import fit


@variant(swept=("sparsity_coefficient",))
class Relu(Variant):
    """Hyperparameters; the equations are at the head of the file.

    The update starts its biases at 0; here they start so that they centre input and output, which spares the first
    steps of learning it.
    """

    sparsity_coefficient: float  # lambda
    centred: bool = False
    initial: Initial = Initial(decoder_norm=0.1)

    def encode(self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute = PLAIN) -> Float[Array, "B F"]:
        """Codes of the rows."""
        return jax.nn.relu(self.pre_activations(params, x_BD, compute))

    def loss(
        self,
        params: Params,
        x_BD: Float[Array, "B D_in"],
        target_BD: Float[Array, "B D_out"],
        moment: Moment,
        compute: Compute = PLAIN,
    ) -> tuple[Float[Array, ""], LossTerms]:
        """Loss of one batch. Dead latents are left alone: the update has no remedy for them."""
        rows = x_BD.shape[0]
        codes_BF = self.encode(params, x_BD, compute)
        recon_BD = self.with_skip(params, x_BD, self.decode(params, codes_BF, compute), compute)
        fitted = fit(self.reconstruction, target_BD, recon_BD)
        coefficient = moment.sparsity_scale * self.sparsity_coefficient
        sparsity = coefficient * jnp.dot(jnp.sum(codes_BF, axis=0), self.decoder_norms(params)) / rows
        active_F = jnp.sum(codes_BF > 0, axis=0, dtype=jnp.int32)
        total = fitted.loss + sparsity
        return total, LossTerms(
            total=total,
            reconstruction=fitted.loss,
            sparsity=sparsity,
            auxiliary=jnp.zeros((), jnp.float32),
            l0=jnp.sum(active_F).astype(jnp.float32) / rows,
            fvu=fitted.fvu,
            active_F=active_F,
        )

    def default_learning_rate(self) -> float:
        """5e-5, the update's value, at every number of latents."""
        return 5e-5
