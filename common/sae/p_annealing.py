"""ReLU sparse autoencoder whose penalty goes from L1 towards L0 during training.

Measuring progress in dictionary learning for language model interpretability with board game models. Adam Karvonen,
Benjamin Wright, Can Rager, Rico Angell, Jannik Brinkmann, Logan Smith, Claudio Mayrink Verdun, David Bau, Samuel Marks.
2024. https://arxiv.org/abs/2408.00113

    f     = relu((x - b_pre) W_enc + b_enc)
    x_hat = f W_dec + b_dec                                    ||W_dec,i|| = 1
    L     = ||x - x_hat||^2 + lambda_p sum_i f_i^p             p = 1 at first, then linearly down to p_end

as a mean over rows and a sum over axes. So that a change of p does not change the size of the penalty, the paper
multiplies lambda at each of some ten changes by sum f^(p before) / sum f^(p after), over the batches before it. All
these ratios have one product, up to what the codes change between them: sum f / sum f^p. Here lambda_p is that, of the
batch at hand and without gradient,

    lambda_p = lambda sg(sum f / sum f^p)

so that p falls at every step, the penalty is as large as L1 with lambda throughout, and nothing but the fraction of the
steps done decides what a step does. Below 1e-5, f^p goes on as a line to 0, where its derivative has no bound.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saex_pipe.common.sae.batch_sums import scaled
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import DecoderRows, Moment, Params, variant
from saex_pipe.common.sae.dense import SWEPT, Activations, Dense
from saex_pipe.common.sae.penalties import power
from saex_pipe.common.sae.reconstruction import ratio_or_zero


@variant(swept=(*SWEPT, "p_end"))
class PAnnealing(Dense):
    """Hyperparameters; the equations are at the head of the file."""

    decoder_rows: DecoderRows = "unit"
    p_end: float = 0.2  # above 0, at most 1
    anneal_start: float = 0.1  # fraction of the steps with p = 1

    def activations(self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute) -> Activations:
        """Penalised are the codes."""
        pre_BF = self.pre_activations(params, x_BD, compute)
        codes_BF = jax.nn.relu(pre_BF)
        return Activations(pre_BF, codes_BF, codes_BF)

    def exponent(self, fraction_done: Float[Array, ""]) -> Float[Array, ""]:
        """p at this point of the training."""
        annealed = jnp.maximum(0.0, fraction_done - self.anneal_start) / (1 - self.anneal_start)
        return 1 - (1 - self.p_end) * annealed

    def penalise(self, params: Params, penalised_BF: Float[Array, "B F"], moment: Moment) -> Float[Array, ""]:
        """sum f^p, brought to the size of sum f."""
        if self.weighted_by_decoder_norms:
            penalised_BF = scaled(penalised_BF, self.decoder_norms(params))
        powers = jnp.mean(power(penalised_BF, self.exponent(moment.fraction_done)))
        codes = jnp.mean(jnp.sum(penalised_BF, axis=1))
        return powers * jax.lax.stop_gradient(ratio_or_zero(codes, powers))
