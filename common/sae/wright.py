"""ReLU sparse autoencoder with a scale per latent that the penalty does not see.

Addressing feature suppression in SAEs. Benjamin Wright, Lee Sharkey. 2024.
https://www.lesswrong.com/posts/3JuSjTZyMzaSeTxKk/addressing-feature-suppression-in-saes

    p     = relu((x - b_pre) W_enc + b_enc)
    f     = s p                                     s = exp(r) > 0, one for each latent
    x_hat = f W_dec + b_dec                         ||W_dec,i|| = 1
    L     = ||x - x_hat||^2 + lambda sum_i p_i

An L1 penalty makes every code smaller than reconstruction wants it; s gives that back. The post fine-tunes a trained
SAE with its encoder frozen and without the penalty: that is the last ``finetune_fraction`` of the steps, before which s
rests at 1. At 0, the default, all learn together and under the penalty, as in saex (https://github.com/neverix/saex).
Then nothing but the pace of learning keeps p from shrinking while s grows, which makes the penalty weaker by and by.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from saex_pipe.common.sae.batch_sums import scaled
from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.contract import DecoderRows, LossTerms, Moment, Params, variant
from saex_pipe.common.sae.dense import SWEPT_WITH_PENALTY, Activations, Penalised
from saex_pipe.common.sae.initial import DataStats


@variant(swept=SWEPT_WITH_PENALTY)
class Wright(Penalised):
    """Hyperparameters; the equations are at the head of the file. ``r_scale_F`` is r."""

    decoder_rows: DecoderRows = "unit"
    finetune_fraction: float = 0.0  # of the steps, the last ones

    def init(self, key: PRNGKeyArray, stats: DataStats) -> Params:
        """s = 1."""
        return {**super().init(key, stats), "r_scale_F": jnp.zeros(self.latents, jnp.float32)}

    def activations(self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute) -> Activations:
        """Penalised are the codes before they are scaled."""
        pre_BF = self.pre_activations(params, x_BD, compute)
        unscaled_BF = jax.nn.relu(pre_BF)
        return Activations(pre_BF, unscaled_BF, scaled(unscaled_BF, jnp.exp(params["r_scale_F"])))

    def loss(
        self,
        params: Params,
        x_BD: Float[Array, "B D_in"],
        target_BD: Float[Array, "B D_out"],
        moment: Moment,
        compute: Compute = PLAIN,
    ) -> tuple[Float[Array, ""], LossTerms]:
        """Loss of one batch; parameters that rest at this moment get no gradient."""
        if self.finetune_fraction > 0:
            tuning = moment.fraction_done >= 1 - self.finetune_fraction
            rest = {"w_enc_FD": tuning, "b_enc_F": tuning, "r_scale_F": ~tuning}
            held = {
                name: jnp.where(rests, jax.lax.stop_gradient(params[name]), params[name])
                for name, rests in rest.items()
            }
            params = {**params, **held}
            moment = moment._replace(sparsity_scale=jnp.where(tuning, 0.0, moment.sparsity_scale))
        return super().loss(params, x_BD, target_BD, moment, compute)

    def for_dead_latents(self, params: Params) -> Params:
        """The decoder's rows times s."""
        return {**params, "w_dec_FD": params["w_dec_FD"] * jnp.exp(params["r_scale_F"])[:, None]}

    def as_relu(self, params: Params) -> Params:
        """Parameters of the ReLU with the same codes: relu(s z) = s relu(z)."""
        scale_F = jnp.exp(params["r_scale_F"])
        rest = {name: leaf for name, leaf in params.items() if name != "r_scale_F"}
        return {**rest, "w_enc_FD": params["w_enc_FD"] * scale_F[:, None], "b_enc_F": params["b_enc_F"] * scale_F}
