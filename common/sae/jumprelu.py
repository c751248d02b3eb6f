"""JumpReLU sparse autoencoder: a threshold per latent, trained straight through its jump, in three published forms.

    z     = (x - b_pre) W_enc + b_enc
    f     = z 1[z > theta]
    x_hat = f W_dec + b_dec

``l0``: Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders. Senthooran Rajamanoharan
and others. 2024. https://arxiv.org/abs/2407.14435; Gemma Scope. Tom Lieberum and others. 2024.
https://arxiv.org/abs/2408.05147

    L = ||x - x_hat||^2 + lambda sum_i 1[z_i > theta_i]              unit decoder rows; the estimate reaches theta only

``tanh``: Circuits updates, January 2025: "Dictionary learning optimization techniques". Anthropic.
https://transformer-circuits.pub/2025/january-update/index.html

    L = ||x - x_hat||^2 + lambda sum_i tanh(c f_i ||W_dec,i||) + lambda_p sum_dead relu(theta_i - z_i) ||W_dec,i||

with the estimate reaching all parameters and b_pre = 0; c = 4, lambda about 20 at the end and rising over the whole
run, lambda_p = 3e-6, eps = 2, theta_0 = 0.1. The update pulls on every latent below its threshold; on dead ones alone
(as SAELens does) the term leaves the codes of the others unbiased. From its start every latent fires on a given share
of the rows, which all forms take: however short the encoder's columns are, they then reach their thresholds.

``target_l0``: Gemma Scope 2. Google DeepMind. 2025. Its penalty is quadratic around a wanted number of active latents,
so that lambda needs no sweep, and latents that fire on more than a tenth of the rows are penalised:

    L = ||x - x_hat||^2 + lambda [(L0 / L0* - 1)^2 + c_f sum_i relu(p_i - 0.1)]    L0, p_i: mean over the batch of
                                                                   sum_i 1[z_i > theta_i] and of 1[z_i > theta_i]

The square is taken of the batch mean (as in dictionary_learning): L0* is wanted on average, not of every row. c_f is
not published; 1 makes a latent that always fires cost as much as an L0 that is wrong by 95 %.

All are means over rows. theta is the parameter, not log theta, for the reason given in ``straight_through``; it is
kept at or above 0. The papers' bandwidth and first threshold, 0.001 for rows of norm 1, are 0.03 for rows of norm
sqrt(D) as they are trained on here (D = 900).
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from saex_pipe.common.sae.batch_sums import rows_above_zero, scaled, shifted
from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.contract import DecoderRows, LossTerms, Moment, Params, Variant, variant
from saex_pipe.common.sae.initial import DataStats, Initial
from saex_pipe.common.sae.nested import decode_nested, fit_nested, with_bias
from saex_pipe.common.sae.straight_through import above, jump, near, rows_above

JumpReluForm = Literal["l0", "tanh", "target_l0"]


class Published(NamedTuple):
    """What a form is published with."""

    bandwidth: float
    threshold_start: float
    threshold_rate: float
    decoder_rows: DecoderRows
    centred: bool
    learning_rate: float
    sparsity_warmup: float


PUBLISHED: dict[JumpReluForm, Published] = {
    "l0": Published(0.03, 0.03, 1.0, "unit", True, 7e-5, 0.0),
    # A tenth of the rate on thresholds is the setting of llamascopium, an open implementation of the update.
    "tanh": Published(2.0, 0.1, 0.1, "free", False, 2e-4, 1.0),
    "target_l0": Published(0.03, 0.03, 1.0, "unit", True, 7e-5, 0.0),
}
_OF_A_RUN = ("learning_rate", "sparsity_warmup")  # rather than of the SAE


SWEPT = (
    *("sparsity_coefficient", "target_l0", "tanh_scale", "pre_activation_coefficient"),
    *("frequency_coefficient", "frequency_limit"),
)


@variant(swept=SWEPT)
class JumpRelu(Variant):
    """Hyperparameters; the equations are at the head of the file.

    The defaults are those of ``tanh``; ``variants.build`` gives each form what it is ``PUBLISHED`` with.
    """

    sparsity_coefficient: float  # lambda
    jumprelu_form: JumpReluForm = "tanh"
    bandwidth: float = PUBLISHED["tanh"].bandwidth  # eps
    threshold_start: float = PUBLISHED["tanh"].threshold_start
    threshold_rate: float = PUBLISHED["tanh"].threshold_rate  # how many times the others' rate thresholds learn at
    target_l0: float = 32.0  # L0* of target_l0
    tanh_scale: float = 4.0  # c of tanh
    pre_activation_coefficient: float = 3e-6  # lambda_p of tanh
    frequency_coefficient: float = 1.0  # c_f of target_l0
    frequency_limit: float = 0.1  # share of rows above which a latent is penalised by target_l0
    decoder_rows: DecoderRows = PUBLISHED["tanh"].decoder_rows
    centred: bool = PUBLISHED["tanh"].centred
    initial: Initial = Initial(encoder_bias="firing_share")

    @property
    def level_widths(self) -> tuple[int, ...]:
        """How many latents each nested dictionary has: one that has all."""
        return (self.latents,)

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the form is published with."""
        published = PUBLISHED[given.get("jumprelu_form", "tanh")]._asdict()
        return {name: value for name, value in published.items() if name not in _OF_A_RUN}

    def init(self, key: PRNGKeyArray, stats: DataStats) -> Params:
        """Parameters at step 0."""
        return {
            **super().init(key, stats),
            "threshold_F": jnp.full(self.latents, self.threshold_start, jnp.float32),
        }

    @property
    def firing_level(self) -> float:
        """The threshold at the start."""
        return self.threshold_start

    def encode(self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute = PLAIN) -> Float[Array, "B F"]:
        """Codes of the rows."""
        return above(self.pre_activations(params, x_BD, compute), params["threshold_F"])

    def loss(
        self,
        params: Params,
        x_BD: Float[Array, "B D_in"],
        target_BD: Float[Array, "B D_out"],
        moment: Moment,
        compute: Compute = PLAIN,
    ) -> tuple[Float[Array, ""], LossTerms]:
        """Loss of one batch."""
        z_BF = self.pre_activations(params, x_BD, compute)
        codes_BF = jump(z_BF, params["threshold_F"], self.bandwidth, self.jumprelu_form == "tanh")
        near_BF = near(z_BF, params["threshold_F"], self.bandwidth)
        levels = decode_nested(codes_BF, params["w_dec_FD"], self.level_widths, compute, wanted_BF=near_BF)
        levels = with_bias(self, params, x_BD, levels, compute)
        fitted = fit_nested(self.reconstruction, target_BD, levels)
        sparsity = moment.sparsity_scale * self.sparsity_coefficient * self._penalty(params, z_BF, codes_BF)
        auxiliary = self._pull(params, z_BF, moment.dead_F)
        active_F = rows_above_zero(codes_BF)
        return LossTerms.of(fitted, active_F, x_BD.shape[0], sparsity=sparsity, auxiliary=auxiliary)

    def _penalty(self, params: Params, z_BF: Array, codes_BF: Array) -> Float[Array, ""]:
        rows = z_BF.shape[0]
        if self.jumprelu_form == "tanh":
            weighted_BF = scaled(codes_BF, self.tanh_scale * self.decoder_norms(params))
            return jnp.sum(jnp.tanh(weighted_BF)) / rows
        frequency_F = rows_above(z_BF, params["threshold_F"], self.bandwidth) / rows
        l0 = jnp.sum(frequency_F)
        if self.jumprelu_form == "l0":
            return l0
        too_often = jnp.sum(jax.nn.relu(frequency_F - self.frequency_limit))
        return jnp.square(l0 / self.target_l0 - 1) + self.frequency_coefficient * too_often

    def _pull(self, params: Params, z_BF: Array, dead_F: Array) -> Float[Array, ""]:
        """Towards their thresholds, of dead latents."""
        if self.jumprelu_form != "tanh":
            return jnp.zeros((), jnp.float32)
        below_BF = jax.nn.relu(shifted(-z_BF, params["threshold_F"]))
        pulled_BF = scaled(below_BF, jnp.where(dead_F, self.decoder_norms(params), 0.0))
        return self.pre_activation_coefficient * jnp.sum(pulled_BF) / z_BF.shape[0]

    def constrain(self, params: Params) -> Params:
        """Thresholds of at least 0, and the decoder's rows."""
        return super().constrain({**params, "threshold_F": jnp.maximum(params["threshold_F"], 0.0)})

    def learning_rate_factors(self) -> dict[str, float]:
        """Thresholds have a rate of their own."""
        return {"threshold_F": self.threshold_rate}

    def published_learning_rate(self) -> float:
        """That of the form's source, at every number of latents."""
        return PUBLISHED[self.jumprelu_form].learning_rate

    def published_sparsity_warmup(self) -> float:
        """That of the form's source."""
        return PUBLISHED[self.jumprelu_form].sparsity_warmup
